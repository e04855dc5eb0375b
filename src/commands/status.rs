//! The command `status`, which shows the present state to a person or a program.
//!
//! Owns: the report. The command changes nothing, and works with or without a running daemon.

use serde_json::{Value, json};

use crate::commands::losses::split_key;
use crate::commands::output::{COLUMNS, Colour, bytes, coloured, daemon_state, paragraph, show};
use crate::config::{Config, Format};
use crate::error::{ErrorKind, Result};
use crate::mount::mountinfo;
use crate::quota::Support;
use crate::root::open::{Purpose, identities, visit};
use crate::snapshotter::{Figures, Held, Snapshotter, VolumeFigures, Written};
use crate::types::{Kind, Limits, Quoted, Volume};
use crate::volume::Reserve;

/// How many of the largest writable snapshots are counted, and shown if the screen has room for
/// them.
const LARGEST: usize = 10;
/// How many of the largest writable snapshots are shown even if the screen has no room for them.
const LEAST: usize = 3;
/// A volume is reported as full if less than one hundredth of it is free.
const FULL: u64 = 100;
/// The lines of the smallest terminal, without the line of the shell.
const ROWS: usize = 23;

/// A volume's directory, and the file system it is on.
struct VolumeState {
    path: String,
    /// The source of the mount and its file system; `None` if unknown.
    mounted: Option<(String, String)>,
    /// The recorded identity of the volume.
    identity: Option<String>,
    /// The reason why the volume cannot be used; `None` if it can.
    problem: Option<String>,
}

struct Status {
    is_running: bool,
    places: [VolumeState; 2],
    figures: Figures,
    /// The reason why there are no quotas; `None` if there are.
    no_quotas: Option<String>,
    largest: Vec<Written>,
    held: Vec<Held>,
    /// How much has to stay free on the writable volume.
    reserve: Reserve,
    /// Whether containers get a default limit.
    wants_limits: bool,
}

/// Prints the present state.
pub fn run(config: &Config, format: Format) -> Result<()> {
    let visit = visit(config, Purpose::Look)?;
    let is_running = visit.lock.is_none();
    // Counting may take long, so the lock is released and a daemon may start.
    drop(visit.lock);
    let snapshotter =
        Snapshotter::new(visit.store, visit.volumes, config.options.for_this_kernel());
    let [root, writable] = identities(snapshotter.store())?;
    let place = |path: &str, volume, identity| -> Result<VolumeState> {
        let problem = snapshotter.problem_of(volume);
        Ok(VolumeState {
            path: path.to_owned(),
            identity,
            mounted: match &problem {
                Some(error) if error.kind() == ErrorKind::Unavailable => None,
                _ => mountinfo::of_path(path)?.map(|mounted| (mounted.source, mounted.file_system)),
            },
            problem: problem.map(|error| error.chain()),
        })
    };
    let status = Status {
        is_running,
        places: [
            place(&config.root, Volume::Image, root)?,
            place(&config.writable, Volume::Writable, writable)?,
        ],
        figures: snapshotter.figures()?,
        no_quotas: snapshotter.quota_support().err().map(|error| error.chain()),
        largest: snapshotter.largest_writable(LARGEST)?,
        held: snapshotter.held()?,
        reserve: config.options.reserve,
        wants_limits: config.options.quota.default != Limits::NONE,
    };
    show(format, || status.sentences(), || status.json());
    Ok(())
}

impl Status {
    /// The report, with problems first. The whole report fits a screen.
    fn sentences(&self) -> String {
        let mut text = String::new();
        let wrong = self.wrong();
        for what in &wrong {
            let line = paragraph(&head("WRONG"), what);
            let rest = line.strip_prefix("WRONG").unwrap_or(&line);
            text.push_str(&format!("{}{rest}", coloured(Colour::Red, "WRONG")));
        }
        let well = if wrong.is_empty() {
            ", nothing is wrong"
        } else {
            ""
        };
        let daemon = format!("{}{well}", daemon_state(self.is_running));
        text.push_str(&paragraph(&head("daemon"), &daemon));
        for (place, figures) in self.places.iter().zip(&self.figures.volumes) {
            let name = figures.volume.to_string();
            text.push_str(&paragraph(&head(&name), &place.path));
            if let Some((source, file_system)) = &place.mounted {
                let on = format!("{source}, {file_system}{}", room(figures));
                text.push_str(&paragraph(&head(""), &on));
            }
        }
        text.push_str(&paragraph(&head("quotas"), &self.quotas()));
        let [committed, active, views] = [Kind::Committed, Kind::Active, Kind::View].map(|kind| {
            let held = self.figures.snapshots.iter();
            let of_kind = held.filter(|held| held.kind == kind);
            of_kind.map(|held| held.count).sum::<u64>()
        });
        let counts = format!("{committed} committed, {active} active, {views} views");
        text.push_str(&paragraph(&head("snapshots"), &counts));
        let away = bytes(self.figures.away_bytes);
        let away = format!("{away} in layers that have not moved to the image volume yet");
        text.push_str(&paragraph(&head("away"), &away));
        if !self.held.is_empty() {
            text.push_str(&paragraph(&head("held"), &self.held()));
        }
        let mut largest = self.largest.iter().peekable();
        if largest.peek().is_some() {
            text.push_str("largest, by what they have written:\n");
        }
        for (number, written) in largest.enumerate() {
            let line = written_line(written);
            if number >= LEAST && rows(&text) + rows(&line) > ROWS {
                break;
            }
            text.push_str(&line);
        }
        text
    }

    /// The reasons why containers cannot be created or started, or will soon fail.
    fn wrong(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        if !self.is_running {
            wrong.push("the daemon is stopped: no container can be created or started".to_owned());
        }
        for (place, figures) in self.places.iter().zip(&self.figures.volumes) {
            let name = figures.volume;
            if let Some(problem) = &place.problem {
                wrong.push(format!("the {name} volume cannot be used: {problem}"));
                continue;
            }
            let free = figures.free_bytes;
            let reserve = match name {
                Volume::Image => 0,
                Volume::Writable => self.reserve.bytes(figures.size_bytes),
            };
            if free < reserve {
                wrong.push(format!(
                    "the {name} volume has {} free, less than --reserve ({}): new containers \
                     are refused",
                    bytes(free),
                    bytes(reserve)
                ));
            } else if figures.size_bytes > 0 && free < figures.size_bytes / FULL {
                wrong.push(format!(
                    "the {name} volume is full, {} are free: remove containers or images",
                    bytes(free)
                ));
            }
        }
        let keeps_limits = self.figures.quotas == Some(Support::Limits);
        if self.wants_limits && !keeps_limits {
            wrong.push(
                "new containers are refused: their limits cannot be enforced on the writable \
                 volume (`doctor` says why)"
                    .to_owned(),
            );
        }
        wrong
    }

    fn quotas(&self) -> String {
        let given = match self.figures.projects {
            1 => "1 project id given out".to_owned(),
            projects => format!("{projects} project ids given out"),
        };
        match (self.figures.quotas, &self.no_quotas) {
            (Some(Support::Limits), _) => format!("limits are enforced, {given}"),
            (Some(Support::Counts), _) => {
                format!("usage is counted, but limits are not enforced, {given}")
            }
            (None, why) => format!("none: {}", why.as_deref().unwrap_or_default()),
        }
    }

    /// Describes how much of the writable volume leftover directories take, and why they are
    /// kept.
    fn held(&self) -> String {
        let held = bytes(self.figures.held_bytes);
        let what = format!("{held} in old directories of layers that have moved");
        let mut points: Vec<_> = self.held.iter().flat_map(|held| &held.points).collect();
        points.sort();
        points.dedup();
        let Some(first) = points.first() else {
            return format!(
                "{what}; nothing has them mounted, and they are deleted within a minute"
            );
        };
        let more = match points.len() - 1 {
            0 => String::new(),
            more => format!(" and {more} more (--json has all)"),
        };
        let first = Quoted(first);
        format!("{what}, until these are unmounted: {first}{more}")
    }

    fn json(&self) -> Value {
        let volume = |place: &VolumeState, figures: &VolumeFigures| {
            json!({
                "volume": figures.volume.to_string(),
                "path": place.path,
                "identity": place.identity,
                "device": place.mounted.as_ref().map(|(source, _)| source),
                "file_system": place.mounted.as_ref().map(|(_, kind)| kind),
                "size_bytes": figures.size_bytes,
                "free_bytes": figures.free_bytes,
                "problem": place.problem,
            })
        };
        let [image, writable] = &self.places;
        let [image_figures, writable_figures] = &self.figures.volumes;
        json!({
            "daemon": daemon_state(self.is_running),
            "volumes": [volume(image, image_figures), volume(writable, writable_figures)],
            "quotas": {
                "state": match self.figures.quotas {
                    Some(Support::Limits) => "limits",
                    Some(Support::Counts) => "counts",
                    None => "none",
                },
                "problem": self.no_quotas,
                "projects": self.figures.projects,
            },
            "snapshots": self.figures.snapshots.iter().map(|held| json!({
                "kind": held.kind.word(),
                "volume": held.volume.map(|volume| volume.to_string()),
                "count": held.count,
            })).collect::<Vec<_>>(),
            "away_bytes": self.figures.away_bytes,
            "held_bytes": self.figures.held_bytes,
            "held": self.held.iter().map(|held| json!({
                "id": held.id,
                "layer": held.layer,
                "bytes": held.bytes,
                "mounted_at": held.points,
            })).collect::<Vec<_>>(),
            "largest": self.largest.iter().map(|written| json!({
                "key": written.key,
                "bytes": written.bytes,
                "inodes": written.inodes,
                "max_bytes": written.limits.max_bytes,
                "max_inodes": written.limits.max_inodes,
            })).collect::<Vec<_>>(),
        })
    }
}

/// The first column of a line.
fn head(name: &str) -> String {
    format!("{name:<10} ")
}

/// How many lines of a terminal a text takes.
fn rows(text: &str) -> usize {
    let lines = text.lines().map(|line| line.chars().count());
    lines.map(|length| length.div_ceil(COLUMNS).max(1)).sum()
}

/// A line with how much a container has written, and with the last part of its key, which the
/// command `mount` accepts.
fn written_line(written: &Written) -> String {
    let (namespace, name) = split_key(&written.key);
    let is_plain = |c: char| c.is_ascii_graphic();
    let name = match namespace {
        "?" => Quoted(name).to_string(),
        _ if !written.key.chars().all(is_plain) => Quoted(&written.key).to_string(),
        _ => format!("{namespace}  {name}"),
    };
    format!(
        "{:>6} {name}{}\n",
        bytes(written.bytes),
        limits(&written.limits)
    )
}

fn room(figures: &VolumeFigures) -> String {
    match figures.size_bytes {
        // The size is unknown, because the volume is missing or does not answer.
        0 => String::new(),
        size => format!(", {}, {} free", bytes(size), bytes(figures.free_bytes)),
    }
}

/// Describes how much a container may take. Empty if there is no limit.
fn limits(limits: &Limits) -> String {
    let mut parts = Vec::new();
    parts.extend(limits.max_bytes.map(bytes));
    parts.extend(limits.max_inodes.map(|inodes| format!("{inodes} inodes")));
    match parts.is_empty() {
        true => String::new(),
        false => format!("  of {}", parts.join(" and ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_that_wrap_are_counted() {
        assert_eq!(rows(""), 0);
        assert_eq!(rows("a\n\nb\n"), 3);
        assert_eq!(rows(&"x".repeat(80)), 1);
        assert_eq!(rows(&"x".repeat(81)), 2);
    }

    #[test]
    fn containers_are_named_as_mount_takes_them() {
        let line = |key: &str| {
            written_line(&Written {
                key: key.to_owned(),
                bytes: 3 << 20,
                inodes: 1,
                limits: Limits::NONE,
            })
        };
        let id = "0123456789abcdef".repeat(4);
        let docker = line(&format!("moby/1234567/{id}"));
        assert_eq!(docker, format!("  3.0M moby  {id}\n"));
        assert_eq!(rows(&docker), 1);
        assert_eq!(line("key"), "  3.0M \"key\"\n");
        assert_eq!(line("a/1/b\nc"), "  3.0M \"a/1/b\\nc\"\n");
    }

    #[test]
    fn limits_are_told_if_there_are_any() {
        let of = |max_bytes, max_inodes| {
            limits(&Limits {
                max_bytes,
                max_inodes,
            })
        };
        assert_eq!(of(None, None), "");
        assert_eq!(of(Some(10 << 30), None), "  of 10G");
        assert_eq!(of(Some(1 << 20), Some(50)), "  of 1.0M and 50 inodes");
    }
}
