//! The command `status`: how things stand, for the person in front of it.
//!
//! Owns: what is told and how. Changes nothing; works beside a running daemon.

use std::io::Write;

use serde_json::{Value, json};

use crate::config::{Config, Format};
use crate::daemon;
use crate::daemon::visit::{Purpose, visit};
use crate::error::{Error, Result};
use crate::mountinfo;
use crate::plain::{bytes, paragraph};
use crate::snapshotter::{Figures, Snapshotter, VolumeFigures, Written};
use crate::types::{Kind, Quoted, Volume};

/// How many of the largest are told.
const LARGEST: usize = 10;

/// A volume's directory and what it is on.
struct Place {
    path: String,
    /// What is mounted there, and its file system; `None` if it cannot be told.
    mounted: Option<(String, String)>,
    /// Why it cannot be used, if so.
    problem: Option<String>,
}

struct Status {
    is_running: bool,
    places: [Place; 2],
    figures: Figures,
    largest: Vec<Written>,
}

/// Tells on standard output.
///
/// # Errors
///
/// Whatever keeps it from looking, in one line.
pub fn run(config: &Config, format: Format) -> Result<()> {
    let visit = visit(config, Purpose::Look)?;
    let is_running = visit.lock.is_none();
    // Counting may take long, and a daemon may start meanwhile.
    drop(visit.lock);
    let snapshotter = Snapshotter::new(visit.store, visit.volumes, daemon::options(config));
    let place = |path: &str, volume| -> Result<Place> {
        Ok(Place {
            path: path.to_owned(),
            mounted: mountinfo::of_path(path)?.map(|mounted| (mounted.source, mounted.file_system)),
            problem: snapshotter
                .problem_of(volume)
                .map(|error: Error| error.chain()),
        })
    };
    let status = Status {
        is_running,
        places: [
            place(&config.root, Volume::Image)?,
            place(&config.writable, Volume::Writable)?,
        ],
        figures: snapshotter.figures()?,
        largest: snapshotter.largest_writable(LARGEST)?,
    };
    let text = match format {
        Format::Human => status.sentences(),
        Format::Json => format!("{:#}\n", status.json()),
    };
    // A closed pipe (`status | head`) is no failure.
    let _ = std::io::stdout().write_all(text.as_bytes());
    Ok(())
}

impl Status {
    fn sentences(&self) -> String {
        let mut text = String::new();
        let head = |name: &str| format!("{name:<10} ");
        let row = |text: &mut String, name: &str, what: &str| {
            text.push_str(&format!("{}{what}\n", head(name)));
        };
        row(
            &mut text,
            "daemon",
            if self.is_running {
                "running"
            } else {
                "stopped"
            },
        );
        for (place, figures) in self.places.iter().zip(&self.figures.volumes) {
            row(&mut text, &figures.volume.to_string(), &place.path);
            if let Some((source, file_system)) = &place.mounted {
                row(
                    &mut text,
                    "",
                    &format!("{source}, {file_system}{}", room(figures)),
                );
            }
            if let Some(problem) = &place.problem {
                let problem = format!("cannot be used: {problem}");
                text.push_str(&paragraph(&head(""), &problem));
            }
        }
        let count = |kind| {
            let of_kind = self
                .figures
                .snapshots
                .iter()
                .filter(|held| held.kind == kind);
            of_kind.map(|held| held.count).sum::<u64>()
        };
        row(
            &mut text,
            "snapshots",
            &format!(
                "{} committed, {} active, {} views",
                count(Kind::Committed),
                count(Kind::Active),
                count(Kind::View)
            ),
        );
        let away = bytes(self.figures.away_bytes);
        row(
            &mut text,
            "away",
            &format!("{away} in layers that are not home yet"),
        );
        for (number, written) in self.largest.iter().enumerate() {
            let name = if number == 0 { "largest" } else { "" };
            let key = Quoted(&written.key);
            row(
                &mut text,
                name,
                &format!("{:>7}  {key}", bytes(written.bytes)),
            );
        }
        text
    }

    fn json(&self) -> Value {
        let volume = |place: &Place, figures: &VolumeFigures| {
            json!({
                "volume": figures.volume.to_string(),
                "path": place.path,
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
            "daemon": if self.is_running { "running" } else { "stopped" },
            "volumes": [volume(image, image_figures), volume(writable, writable_figures)],
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
