//! The command `status`: how things stand, for the person in front of it.
//!
//! Owns: the report. Changes nothing; works beside a running daemon.

use serde_json::{Value, json};

use crate::commands::output::{bytes, daemon_state, paragraph, show};
use crate::config::{Config, Format};
use crate::error::Result;
use crate::mount::mountinfo;
use crate::quota::Support;
use crate::root::open::{Purpose, identities, visit};
use crate::snapshotter::{Figures, Snapshotter, VolumeFigures, Written};
use crate::types::{Kind, Limits, Quoted, Volume};

/// How many of the largest writable snapshots are reported.
const LARGEST: usize = 10;

/// A volume's directory and what it is on.
struct VolumeState {
    path: String,
    /// What is mounted there, and its file system; `None` if that is unknown.
    mounted: Option<(String, String)>,
    /// Which one it is, as it is recorded.
    identity: Option<String>,
    /// Why it cannot be used, if so.
    problem: Option<String>,
}

struct Status {
    is_running: bool,
    places: [VolumeState; 2],
    figures: Figures,
    /// Why quotas do nothing, if so.
    no_quotas: Option<String>,
    largest: Vec<Written>,
}

/// Prints how things stand.
pub fn run(config: &Config, format: Format) -> Result<()> {
    let visit = visit(config, Purpose::Look)?;
    let is_running = visit.lock.is_none();
    // Counting may take long, and a daemon may start meanwhile.
    drop(visit.lock);
    let snapshotter =
        Snapshotter::new(visit.store, visit.volumes, config.options.for_this_kernel());
    let [root, writable] = identities(snapshotter.store())?;
    let place = |path: &str, volume, identity| -> Result<VolumeState> {
        Ok(VolumeState {
            path: path.to_owned(),
            identity,
            mounted: mountinfo::of_path(path)?.map(|mounted| (mounted.source, mounted.file_system)),
            problem: snapshotter.problem_of(volume).map(|error| error.chain()),
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
    };
    show(format, || status.sentences(), || status.json());
    Ok(())
}

impl Status {
    fn sentences(&self) -> String {
        let mut text = String::new();
        let head = |name: &str| format!("{name:<10} ");
        let row = |text: &mut String, name: &str, what: &str| {
            text.push_str(&format!("{}{what}\n", head(name)));
        };
        row(&mut text, "daemon", daemon_state(self.is_running));
        for (place, figures) in self.places.iter().zip(&self.figures.volumes) {
            row(&mut text, &figures.volume.to_string(), &place.path);
            if let Some((source, file_system)) = &place.mounted {
                let on = format!("{source}, {file_system}{}", room(figures));
                row(&mut text, "", &on);
            }
            if let Some(identity) = &place.identity {
                row(&mut text, "", identity);
            }
            if let Some(problem) = &place.problem {
                let problem = format!("cannot be used: {problem}");
                text.push_str(&paragraph(&head(""), &problem));
            }
        }
        text.push_str(&paragraph(&head("quotas"), &self.quotas()));
        let [committed, active, views] = [Kind::Committed, Kind::Active, Kind::View].map(|kind| {
            let held = self.figures.snapshots.iter();
            let of_kind = held.filter(|held| held.kind == kind);
            of_kind.map(|held| held.count).sum::<u64>()
        });
        let counts = format!("{committed} committed, {active} active, {views} views");
        row(&mut text, "snapshots", &counts);
        let away = bytes(self.figures.away_bytes);
        let away = format!("{away} in layers that are not home yet");
        row(&mut text, "away", &away);
        for (number, written) in self.largest.iter().enumerate() {
            let name = if number == 0 { "largest" } else { "" };
            let key = Quoted(&written.key);
            let of = limits(&written.limits);
            let what = format!("{:>7}  {key}{of}", bytes(written.bytes));
            row(&mut text, name, &what);
        }
        text
    }

    fn quotas(&self) -> String {
        let given = match self.figures.projects {
            1 => "1 project id given out".to_owned(),
            projects => format!("{projects} project ids given out"),
        };
        match (self.figures.quotas, &self.no_quotas) {
            (Some(Support::Limits), _) => format!("limits are kept, {given}"),
            (Some(Support::Counts), _) => {
                format!("usage is counted, but limits are not kept, {given}")
            }
            (None, why) => format!("none: {}", why.as_deref().unwrap_or_default()),
        }
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

fn room(figures: &VolumeFigures) -> String {
    match figures.size_bytes {
        // It cannot be asked.
        0 => String::new(),
        size => format!(", {}, {} free", bytes(size), bytes(figures.free_bytes)),
    }
}

/// What a container may take, if that is limited.
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
