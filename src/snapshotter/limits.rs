//! How many bytes and inodes a snapshot may take, according to its labels and the
//! configuration. No I/O.

use super::label_source::LabelSource;
use crate::error::{Error, Result};
use crate::text::size::{parse_bytes, parse_number};
use crate::types::{
    LABEL_MAX_INODES, LABEL_MAX_SIZE, LABEL_OWN_MAX_SIZE, Labels, Limits, Quoted, Usage,
};

/// How many bytes have to be free to mount an overlay: overlayfs creates a directory, for
/// which XFS with blocks of 4 KiB reserves between 128 and 256 KiB.
const MOUNT_BYTES: u64 = 256 << 10;
/// How many inodes have to be free to mount an overlay: for a directory of overlayfs, and
/// for the files with which overlayfs tries out the file system.
const MOUNT_INODES: u64 = 4;

/// By how many bytes a snapshot may exceed its limit because of loans for its mounts.
const ROOM_BYTES: u64 = 2 * MOUNT_BYTES;
/// By how many inodes a snapshot may exceed its limit because of loans for its mounts.
const ROOM_INODES: u64 = 2 * MOUNT_INODES;

/// The smallest limit in bytes. It is enough for an empty snapshot, a loan, and some files
/// of the container.
pub const LEAST_BYTES: u64 = 2 * ROOM_BYTES;
/// The smallest limit in inodes. It is enough for an empty snapshot, a loan, and some files
/// of the container.
pub const LEAST_INODES: u64 = 2 * ROOM_INODES;

/// The limits that labels ask for. `Some(0)` means no limit, even if there is a default,
/// and `None` means the default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    max_bytes: Option<u64>,
    max_inodes: Option<u64>,
}

impl Asked {
    /// The limits that labels from `source` ask for. A pod cannot get more than `default`.
    ///
    /// # Errors
    ///
    /// Those of [`Asked::read`], but only for the administrator's labels.
    pub(super) fn of(source: LabelSource, labels: &Labels, default: Limits) -> Result<Asked> {
        match source {
            LabelSource::Image => Ok(Asked::default()),
            LabelSource::Pod => Ok(Asked::hint(labels, default)),
            LabelSource::Administrator => Asked::read(labels),
        }
    }

    /// The limits that a pod asks for by containerd's own label, never more than the
    /// default. For containerd, this label is a hint that a snapshotter may ignore
    /// (`LabelSnapshotMaxSize`), so no value of it is a reason to refuse the pod.
    fn hint(labels: &Labels, default: Limits) -> Asked {
        let hinted = labels.get(LABEL_MAX_SIZE).and_then(|text| as_bytes(text));
        let hinted = hinted.map(|bytes| bytes.max(LEAST_BYTES));
        Asked {
            max_bytes: hinted.map(|bytes| bytes.min(default.max_bytes.unwrap_or(bytes))),
            max_inodes: None,
        }
    }

    /// Reads the labels; containerd's own label takes precedence over this
    /// program's.
    ///
    /// # Errors
    ///
    /// [`crate::error::ErrorKind::InvalidArgument`] for a text that is not a size or
    /// number, or for less than the smallest limit. All three labels are checked, even if
    /// one does not count because another takes precedence.
    pub fn read(labels: &Labels) -> Result<Asked> {
        let by_containerd = read(labels, LABEL_MAX_SIZE, |text| match as_bytes(text) {
            Some(bytes) if bytes >= LEAST_BYTES => Ok(bytes),
            _ => Err(format!(
                "a decimal number of bytes, at least {LEAST_BYTES}, without a unit \
                     ({LABEL_OWN_MAX_SIZE} takes units)"
            )),
        })?;
        let own = read(labels, LABEL_OWN_MAX_SIZE, |text| {
            parse_size(text).ok_or_else(size_wanted)
        })?;
        Ok(Asked {
            max_bytes: by_containerd.or(own),
            max_inodes: read(labels, LABEL_MAX_INODES, |text| {
                parse_inodes(text).ok_or_else(inodes_wanted)
            })?,
        })
    }

    /// Whether the labels ask for any limit.
    pub fn is_limit(self) -> bool {
        let is_limit = |number: Option<u64>| number.is_some_and(|number| number > 0);
        is_limit(self.max_bytes) || is_limit(self.max_inodes)
    }

    /// The limits to enforce: those of the labels, and `default` where the labels say
    /// nothing.
    pub fn or(self, default: Limits) -> Limits {
        let pick = |asked: Option<u64>, default| match asked {
            None => default,
            Some(0) => None,
            Some(number) => Some(number),
        };
        Limits {
            max_bytes: pick(self.max_bytes, default.max_bytes),
            max_inodes: pick(self.max_inodes, default.max_inodes),
        }
    }
}

/// Raises limits so that an overlay can be mounted in a snapshot with this usage.
///
/// A loan is added to the limit, not to the usage. Files that are written during a loan
/// stay, so if the next loan were added to the usage, each restart of a full container
/// would permit it to write more. A snapshot that takes more than limit and loan together,
/// because its limit was lowered, gets its usage plus what the mount itself needs.
pub(super) fn with_room(limits: Limits, used: Usage) -> Limits {
    let raised = |limit: Option<u64>, used: u64, mount: u64, room: u64| {
        limit.map(|limit| match used + mount <= limit {
            true => limit,
            false => (used + mount).max(limit + room),
        })
    };
    Limits {
        max_bytes: raised(limits.max_bytes, used.size_bytes, MOUNT_BYTES, ROOM_BYTES),
        max_inodes: raised(limits.max_inodes, used.inodes, MOUNT_INODES, ROOM_INODES),
    }
}

/// Parses the size of a limit, in bytes; 0 means no limit. `None` for any other text.
pub fn parse_size(text: &str) -> Option<u64> {
    // The kernel computes limits with 63 bits.
    let bytes = parse_bytes(text).filter(|bytes| i64::try_from(*bytes).is_ok())?;
    (bytes == 0 || bytes >= LEAST_BYTES).then_some(bytes)
}

/// Parses the number of inodes of a limit; 0 means no limit. `None` for any other text.
pub fn parse_inodes(text: &str) -> Option<u64> {
    let inodes = parse_number(text).filter(|inodes| i64::try_from(*inodes).is_ok())?;
    (inodes == 0 || inodes >= LEAST_INODES).then_some(inodes)
}

/// Describes the sizes that [`parse_size`] accepts, for errors.
pub fn size_wanted() -> String {
    format!(
        "a size such as 512Mi or 10G, at least {}M, or 0 for no limit",
        LEAST_BYTES >> 20
    )
}

/// Describes the numbers that [`parse_inodes`] accepts, for errors.
pub fn inodes_wanted() -> String {
    format!("a number of files and directories, at least {LEAST_INODES}, or 0 for no limit")
}

/// Parses the value of containerd's label: a number of bytes that fits an int64.
fn as_bytes(text: &str) -> Option<u64> {
    parse_number(text).filter(|bytes| i64::try_from(*bytes).is_ok())
}

fn read(
    labels: &Labels,
    label: &str,
    parse: impl Fn(&str) -> std::result::Result<u64, String>,
) -> Result<Option<u64>> {
    let Some(text) = labels.get(label) else {
        return Ok(None);
    };
    parse(text).map(Some).map_err(|wanted| {
        Error::invalid(format!(
            "label {label} is {}, it has to be {wanted}",
            Quoted(text)
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::super::labels::tests::labels;
    use super::*;
    use crate::error::ErrorKind;

    const DEFAULT: Limits = Limits {
        max_bytes: Some(7 << 20),
        max_inodes: None,
    };

    fn limits(pairs: &[(&str, &str)]) -> (Option<u64>, Option<u64>) {
        let limits = Asked::read(&labels(pairs)).unwrap().or(DEFAULT);
        (limits.max_bytes, limits.max_inodes)
    }

    #[test]
    fn the_most_specific_one_counts() {
        let containerd = (LABEL_MAX_SIZE, "1048576");
        let own = (LABEL_OWN_MAX_SIZE, "2Mi");
        assert_eq!(limits(&[]), (Some(7 << 20), None));
        assert_eq!(limits(&[own]), (Some(2 << 20), None));
        assert_eq!(limits(&[own, containerd]), (Some(1 << 20), None));
        assert_eq!(
            limits(&[containerd, (LABEL_MAX_INODES, "100")]),
            (Some(1 << 20), Some(100))
        );
        assert_eq!(limits(&[(LABEL_OWN_MAX_SIZE, "0")]), (None, None));
        let asks = |pairs: &[(&str, &str)]| Asked::read(&labels(pairs)).unwrap().is_limit();
        assert!(asks(&[own]) && asks(&[(LABEL_MAX_INODES, "16")]));
        assert!(!asks(&[]) && !asks(&[(LABEL_OWN_MAX_SIZE, "0"), (LABEL_MAX_INODES, "0")]));
    }

    #[test]
    fn a_pods_hint_only_lowers_the_default_and_is_never_refused() {
        let of = |text: &str, default| {
            let asked = labels(&[(LABEL_MAX_SIZE, text)]);
            let asked = Asked::of(LabelSource::Pod, &asked, default).unwrap();
            asked.or(default).max_bytes
        };
        for (text, without_default, with_default) in [
            ("2097152", Some(2 << 20), Some(2 << 20)),
            ("8388608", Some(8 << 20), Some(7 << 20)),
            ("9223372036854775807", Some(i64::MAX as u64), Some(7 << 20)),
            ("1048575", Some(LEAST_BYTES), Some(LEAST_BYTES)),
            ("1", Some(LEAST_BYTES), Some(LEAST_BYTES)),
            ("0", Some(LEAST_BYTES), Some(LEAST_BYTES)),
            ("9223372036854775808", None, Some(7 << 20)),
            ("-1", None, Some(7 << 20)),
            ("2M", None, Some(7 << 20)),
            ("x", None, Some(7 << 20)),
        ] {
            assert_eq!(of(text, Limits::NONE), without_default, "{text}");
            assert_eq!(of(text, DEFAULT), with_default, "{text}");
        }
    }

    #[test]
    fn only_what_lacks_room_is_raised() {
        let limits = |max_bytes, max_inodes| Limits {
            max_bytes,
            max_inodes,
        };
        let raised = |given, size_bytes, inodes| with_room(given, Usage { size_bytes, inodes });
        let both = limits(Some(10 << 20), Some(100));
        let most = limits(Some((10 << 20) + ROOM_BYTES), Some(100 + ROOM_INODES));
        assert_eq!(raised(both, 9 << 20, 96), both);
        assert_eq!(
            raised(both, 10 << 20, 96),
            limits(most.max_bytes, Some(100))
        );
        // A project that was written to during an earlier loan gets the same limit again.
        for over in [1, 4 << 10, ROOM_BYTES - MOUNT_BYTES] {
            assert_eq!(raised(both, (10 << 20) + over, 100), most, "{over}");
        }
        assert_eq!(raised(both, 10 << 20, 104), most);
        // Far over a limit that was lowered, the mount gets what it needs, and
        // no more.
        assert_eq!(
            raised(both, 0, 500),
            limits(Some(10 << 20), Some(500 + MOUNT_INODES))
        );
        assert_eq!(
            raised(both, 64 << 20, 0),
            limits(Some((64 << 20) + MOUNT_BYTES), Some(100))
        );
        assert_eq!(raised(Limits::NONE, 1 << 40, 1 << 20), Limits::NONE);
        // A new container starts without a loan.
        let least = limits(Some(LEAST_BYTES), Some(LEAST_INODES));
        assert_eq!(raised(least, 64 << 10, 6), least);
    }

    #[test]
    fn what_is_no_limit_is_refused() {
        let table: &[(&str, &[&str])] = &[
            (
                LABEL_MAX_SIZE,
                &[
                    "10G",
                    "0",
                    "-1",
                    "1048575",
                    "1e9",
                    " 1048576",
                    "9223372036854775808",
                    "99999999999999999999",
                ],
            ),
            (
                LABEL_OWN_MAX_SIZE,
                &["ten", "1023K", "-5G", "8388608T", "1.5G"],
            ),
            (
                LABEL_MAX_INODES,
                &["15", "1K", "many", "18446744073709551615"],
            ),
        ];
        for (label, texts) in table {
            for text in *texts {
                let given = labels(&[(label, text)]);
                let error = Asked::read(&given).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{label} {text}");
                let said = error.chain();
                assert!(said.contains(label) && said.contains(text.trim()), "{said}");
            }
        }
        // A bad label is also refused next to a valid one that takes precedence.
        let hidden = labels(&[(LABEL_MAX_SIZE, "1048576"), (LABEL_OWN_MAX_SIZE, "x")]);
        Asked::read(&hidden).unwrap_err();
    }
}
