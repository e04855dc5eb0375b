//! The basic types that the whole program uses: ids, labels, kinds, volumes, limits, mounts.
//!
//! Owns: plain values and how they are shown. Never: I/O or decisions.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fmt;
use std::ops::Deref;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Labels of a snapshot, sorted by key so that every listing is stable.
pub type Labels = BTreeMap<String, String>;

/// The label that says which layer an unpacked snapshot will become
/// (containerd `core/snapshots/snapshotter.go`, `labelSnapshotRef`).
pub const LABEL_SNAPSHOT_REF: &str = "containerd.io/snapshot.ref";
/// The label with the parent of a layer that is being unpacked. containerd 2.3 sets it
/// also where the parent is named only at the commit.
pub const LABEL_PARENT_CHAIN_ID: &str = "containerd.io/snapshot/parent-chain-id";
/// The label with the directory of a snapshot's own files. With `--upperdir-label`, answers
/// have this label (containerd `plugins/snapshots/overlay/overlay.go`, `upperdirKey`).
pub const LABEL_UPPERDIR: &str = "containerd.io/snapshot/overlay.upperdir";
/// The label with the user id mapping of a container (containerd's `LabelSnapshotUIDMapping`).
pub const LABEL_UID_MAPPING: &str = "containerd.io/snapshot/uidmapping";
/// The label with the group id mapping of a container (containerd's `LabelSnapshotGIDMapping`).
pub const LABEL_GID_MAPPING: &str = "containerd.io/snapshot/gidmapping";
/// The label with which a user chooses the volume of a snapshot: `image` or `writable`.
pub const LABEL_VOLUME: &str = "containerd.io/snapshot/overlay-read-write-splitting.volume";

/// The label with the host directories to show beneath a container's writes, separated by
/// colons.
pub const LABEL_LOWERS: &str = "containerd.io/snapshot/overlay-custom-add-lower.paths";
/// The label with the image for which a layer was pulled. CRI and some other clients set it
/// (containerd `pkg/snapshotters/annotations.go`, `TargetRefLabel`).
pub const LABEL_IMAGE_REF: &str = "containerd.io/snapshot/cri.image-ref";
/// The label that says how many bytes an active snapshot may take, in decimal (containerd 2.4
/// `core/snapshots/snapshotter.go`, `LabelSnapshotMaxSize`).
pub const LABEL_MAX_SIZE: &str = "containerd.io/snapshot/max-size";
/// The same limit as [`LABEL_MAX_SIZE`]; this label's value may have a unit.
pub const LABEL_OWN_MAX_SIZE: &str = "containerd.io/snapshot/overlay-read-write-splitting.max-size";
/// The label that says how many inodes an active snapshot may take.
pub const LABEL_MAX_INODES: &str = "containerd.io/snapshot/overlay-read-write-splitting.max-inodes";

/// The most bytes that a label's key and value may have together (containerd
/// `pkg/labels/validate.go`).
pub const MAX_LABEL_BYTES: usize = 4096;

/// No id is higher: a million snapshots a second would reach this number after
/// 285 years. A directory with a higher number as its name was made by another
/// program.
const MAX_ID: u64 = 1 << 53;

/// The number of a snapshot, which is also the name of its directories. The first snapshot has
/// the number 1, and each new one gets a higher number. A commit does not change the number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SnapshotId(u64);

impl SnapshotId {
    /// An id from its number.
    pub fn new(number: u64) -> SnapshotId {
        SnapshotId(number)
    }

    /// The number itself.
    pub fn number(self) -> u64 {
        self.0
    }

    /// Reads the name of a snapshot directory: decimal digits without sign or
    /// leading zero. Anything else was not made by this program.
    pub fn from_directory_name(name: &[u8]) -> Option<SnapshotId> {
        let canonical =
            name.first().is_some_and(|first| *first != b'0') && name.iter().all(u8::is_ascii_digit);
        if !canonical {
            return None;
        }
        let number = std::str::from_utf8(name).ok()?.parse().ok()?;
        (number <= MAX_ID).then_some(SnapshotId(number))
    }
}

impl fmt::Display for SnapshotId {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(out)
    }
}

/// The number of a project, to which a file system charges inodes and blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ProjectId(u32);

impl ProjectId {
    /// The project of every inode that has no other one.
    pub const NONE: ProjectId = ProjectId(0);

    /// A project from its number.
    pub fn new(number: u32) -> ProjectId {
        ProjectId(number)
    }

    /// The number itself.
    pub fn number(self) -> u32 {
        self.0
    }
}

impl fmt::Display for ProjectId {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(out)
    }
}

/// What a snapshot is for (containerd `core/snapshots`, `Kind`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Read-only, on top of a committed snapshot.
    View,
    /// Writable.
    Active,
    /// A layer: immutable, may be a parent.
    Committed,
}

impl Kind {
    /// The word that filters use.
    pub fn word(self) -> &'static str {
        match self {
            Kind::View => "view",
            Kind::Active => "active",
            Kind::Committed => "committed",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(self.word())
    }
}

/// One of the two places where bytes are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Volume {
    /// The image volume, `<root>`: big and cheap, for image layers.
    Image,
    /// The writable volume, `<writable>`: small and fast, for what containers write.
    Writable,
}

impl fmt::Display for Volume {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Volume::Image => "image",
            Volume::Writable => "writable",
        })
    }
}

/// Consecutive ids, from `first` on, that a database has reserved in one step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    /// The first id.
    pub first: u64,
    /// A random number, so that no two databases have the same block.
    pub token: String,
}

impl Block {
    const LENGTH: u64 = 256;

    /// The last id of the block.
    pub fn last(&self) -> u64 {
        self.first.saturating_add(Block::LENGTH - 1)
    }
}

/// How the state of a volume and the state of a database fit together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum History {
    /// Nothing shows that the volume and the database are in states of different times.
    Same,
    /// The volume is in an earlier state than the database.
    Earlier,
    /// The volume belongs to another database, or is in a later state than this
    /// database.
    Other,
}

/// What a snapshot itself takes, without its parents.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Allocated bytes: blocks of 512 bytes × 512.
    pub size_bytes: u64,
    /// Inodes; hard links to one inode count once.
    pub inodes: u64,
}

/// The most that a project may take; `None` means no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Bytes, in whole KiB.
    pub max_bytes: Option<u64>,
    /// Inodes.
    pub max_inodes: Option<u64>,
}

impl Limits {
    /// No limit for either.
    pub const NONE: Limits = Limits {
        max_bytes: None,
        max_inodes: None,
    };

    /// Whether a file system that reports the limits `held` enforces these limits. It may have
    /// rounded them up to its blocks.
    pub fn are_kept_by(self, held: Limits) -> bool {
        const MOST_BLOCK: u64 = 64 << 10;
        let bytes = match (self.max_bytes, held.max_bytes) {
            (None, None) => true,
            (Some(told), Some(kept)) => kept.abs_diff(told) < MOST_BLOCK,
            _ => false,
        };
        bytes && self.max_inodes == held.max_inodes
    }
}

/// What a walk has counted in a tree of files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Content {
    /// How much space and how many inodes the tree takes. A copy on another file system may
    /// take more or less.
    pub usage: Usage,
    /// The sum of the lengths of all regular files, each inode once. Every complete copy has
    /// the same sum. The sum is smaller if a disk has lost the end of a file.
    pub data_bytes: u64,
    /// What else was counted if the tree is a layer.
    pub marks: Option<Marks>,
}

/// Properties of a layer's tree other than the number and length of its files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Marks {
    /// How many extended attributes belong to the layer's content: those of overlayfs,
    /// capabilities, and those of users. If a copy lacks some of overlayfs's attributes, files
    /// that the layer deletes appear again.
    pub attributes: u64,
    /// Whether the tree holds nothing but empty files, directories and links into
    /// /proc, and hides nothing of the layers below. An empty layer can replace such a
    /// layer.
    pub is_hollow: bool,
}

/// A moment in UTC, in nanoseconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Timestamp(i64);

impl Timestamp {
    /// This moment by the system's clock.
    pub fn now() -> Timestamp {
        let nanos = match SystemTime::now().duration_since(UNIX_EPOCH) {
            Ok(after) => i64::try_from(after.as_nanos()).unwrap_or(i64::MAX),
            Err(before) => Duration::as_nanos(&before.duration())
                .try_into()
                .map_or(i64::MIN, |nanos: i64| -nanos),
        };
        Timestamp(nanos)
    }

    /// The moment that is this number of nanoseconds after the beginning of 1970.
    pub fn from_nanos(nanos: i64) -> Timestamp {
        Timestamp(nanos)
    }

    /// Nanoseconds since 1970.
    pub fn nanos(self) -> i64 {
        self.0
    }

    /// Whole seconds since 1970, and the nanoseconds (0 to 999,999,999) after.
    pub fn seconds_and_nanos(self) -> (i64, i32) {
        let nanos = self.0.rem_euclid(1_000_000_000);
        (
            self.0.div_euclid(1_000_000_000),
            i32::try_from(nanos).expect("a remainder of 10^9 fits 32 bits"),
        )
    }
}

/// A snapshot as callers see it (containerd `core/snapshots`, `Info`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Info {
    /// The key of an active snapshot or a view, the name of a committed one.
    pub name: String,
    /// The parent's name; empty without one.
    pub parent: String,
    /// What the snapshot is for.
    pub kind: Kind,
    /// When the snapshot was prepared or, if it is a layer, committed.
    pub created: Timestamp,
    /// When the snapshot was prepared, committed or last updated.
    pub updated: Timestamp,
    /// The labels of the snapshot.
    pub labels: Labels,
}

/// A path that can be part of a mount option: absolute, normalised, and without commas,
/// colons, backslashes and control characters. In a mount option, a comma ends the
/// option, a colon ends a lower directory, and a backslash escapes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountPath(String);

impl MountPath {
    /// Normalises an absolute path. The error says what is wrong with the path.
    pub fn parse(path: &str) -> Result<MountPath, &'static str> {
        if path.contains(|c: char| matches!(c, ',' | ':' | '\\') || c.is_control()) {
            return Err(
                "commas, colons, backslashes and control characters have a meaning for mount(8): \
                 choose a path without them",
            );
        }
        if !path.starts_with('/') {
            return Err("give an absolute path");
        }
        let mut normal = String::new();
        for name in path.split('/') {
            match name {
                "" | "." => {}
                ".." => return Err("give a path without \"..\""),
                name => normal.extend(["/", name]),
            }
        }
        match normal.is_empty() {
            true => Err("the root of all file systems cannot be used"),
            false => Ok(MountPath(normal)),
        }
    }
}

impl Deref for MountPath {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl AsRef<OsStr> for MountPath {
    fn as_ref(&self) -> &OsStr {
        self.0.as_ref()
    }
}

impl fmt::Display for MountPath {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(self)
    }
}

/// The directories of a snapshot that can be written to, as absolute paths.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotPaths {
    /// The directory with the snapshot's own files, which is overlayfs's upper directory.
    pub upper: String,
    /// overlayfs's work directory.
    pub work: String,
}

/// One mount for the caller to make (containerd `core/mount`, `Mount`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// `bind` or `overlay`.
    pub fs_type: &'static str,
    /// The directory to bind, or `overlay`.
    pub source: String,
    /// Mount options in the order in which tools expect them.
    pub options: Vec<String>,
}

/// Shows a caller's string in a message: quoted, control characters escaped,
/// cut to a length that fits a log line and a gRPC trailer.
pub struct Quoted<'a>(pub &'a str);

/// How many characters of a caller's string a message repeats.
const QUOTED_CHARS: usize = 160;

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut chars = self.0.chars();
        out.write_str("\"")?;
        for c in chars.by_ref().take(QUOTED_CHARS) {
            match c {
                '"' | '\\' => write!(out, "\\{c}")?,
                _ => write_escaped(out, c)?,
            }
        }
        out.write_str("\"")?;
        if chars.next().is_some() {
            write!(out, "… ({} bytes)", self.0.len())?;
        }
        Ok(())
    }
}

/// Shows a path as [`Quoted`] shows a string.
pub struct QuotedPath<'a>(pub &'a Path);

impl fmt::Display for QuotedPath<'_> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        Quoted(&self.0.to_string_lossy()).fmt(out)
    }
}

/// Writes a character, escaped if a terminal would obey it ([`is_obeyed`]).
pub fn write_escaped(out: &mut impl fmt::Write, c: char) -> fmt::Result {
    match is_obeyed(c) {
        true => write!(out, "{}", c.escape_default()),
        false => out.write_char(c),
    }
}

/// Whether a terminal obeys a character instead of showing it. This includes characters that
/// change the direction of a text, because they can make a text look like another one.
pub fn is_obeyed(c: char) -> bool {
    let turns = ['\u{61c}', '\u{200e}', '\u{200f}'].contains(&c)
        || ('\u{202a}'..='\u{202e}').contains(&c)
        || ('\u{2066}'..='\u{2069}').contains(&c);
    turns || c.is_control()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_may_be_rounded_to_blocks() {
        let limits = |max_bytes, max_inodes| Limits {
            max_bytes,
            max_inodes,
        };
        let told = limits(Some((1 << 20) + 1), Some(100));
        assert!(told.are_kept_by(limits(Some(1 << 20), Some(100))));
        assert!(told.are_kept_by(limits(Some((1 << 20) + 4096), Some(100))));
        assert!(!told.are_kept_by(limits(Some(2 << 20), Some(100))));
        assert!(!told.are_kept_by(limits(None, Some(100))));
        assert!(!told.are_kept_by(limits(Some(1 << 20), None)));
        assert!(Limits::NONE.are_kept_by(Limits::NONE));
    }

    #[test]
    fn directory_names_are_canonical_decimals() {
        let id = |name: &str| SnapshotId::from_directory_name(name.as_bytes());
        assert_eq!(id("1"), Some(SnapshotId::new(1)));
        assert_eq!(id("9007199254740992"), Some(SnapshotId::new(1 << 53)));
        for strange in [
            "",
            "0",
            "01",
            "-1",
            "+1",
            "1 ",
            "1a",
            "9007199254740993",
            "18446744073709551616",
            ".moving-1",
        ] {
            assert_eq!(id(strange), None, "{strange:?}");
        }
    }

    #[test]
    fn quoted_strings_are_short_and_on_one_line() {
        assert_eq!(Quoted("a/b c").to_string(), "\"a/b c\"");
        assert_eq!(Quoted("a\n\"\u{0}").to_string(), "\"a\\n\\\"\\u{0}\"");
        assert_eq!(
            QuotedPath(Path::new("/\u{9b}31m\u{202e}\\")).to_string(),
            "\"/\\u{9b}31m\\u{202e}\\\\\""
        );
        let long = Quoted(&"é".repeat(100_000)).to_string();
        assert!(long.ends_with("… (200000 bytes)"), "{long}");
        assert!(long.chars().count() < 200);
    }

    #[test]
    fn timestamps_split_without_losing_a_nanosecond() {
        assert_eq!(
            Timestamp::from_nanos(1_000_000_001).seconds_and_nanos(),
            (1, 1)
        );
        assert_eq!(
            Timestamp::from_nanos(-1).seconds_and_nanos(),
            (-1, 999_999_999)
        );
        assert!(Timestamp::now().nanos() > 1_700_000_000_000_000_000);
    }
}
