//! Writes figures for Prometheus to a file that the textfile collector of its node exporter
//! reads.
//!
//! Collecting the figures wakes no disk, because the kernel has those of the volumes in its
//! memory. The file is replaced as a whole, so that a reader never sees half of it. It need not
//! survive a crash.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::time::Duration;

use crate::error::Result;
use crate::quota::Support;
use crate::service::Service;
use crate::snapshotter::{Figures, VolumeFigures};
use crate::text::prometheus::{Kind, head, line};
use crate::util::monitor::Monitor;
use crate::util::threads::Background;

/// How often the file is written. By default, Prometheus reads it once a minute.
const INTERVAL: Duration = Duration::from_secs(15);

/// Starts the thread that writes the file, if the configuration names one. A failed write is
/// only logged, because containers do not need the file.
pub fn start(service: &Arc<Service>, path: Option<&str>) -> Result<Option<Background>> {
    let Some(path) = path else {
        return Ok(None);
    };
    let (service, path) = (Arc::clone(service), path.to_owned());
    let stop = Arc::new(Monitor::<()>::default());
    let work = move |stop: &Monitor<()>| {
        let mut is_broken = false;
        loop {
            let written = write(&service, &path);
            // Logged once each time that writing begins to fail.
            if let Err(error) = &written
                && !is_broken
            {
                log::warn!(
                    "cannot write the metrics to {path} (--metrics-file), so Prometheus sees old \
                     figures: {error}"
                );
            }
            is_broken = written.is_err();
            if !stop.pause(INTERVAL) {
                return;
            }
        }
    };
    Background::start("metrics writer", &stop, Monitor::stop, work).map(Some)
}

fn write(service: &Service, path: &str) -> std::io::Result<()> {
    let mut text = String::new();
    service.metrics.render(&mut text);
    match service.snapshotter.figures() {
        Ok(figures) => render(&figures, &mut text),
        Err(error) => log::warn!(
            "cannot collect the figures for --metrics-file: {}",
            error.chain()
        ),
    }
    // The collector reads all files whose names end in .prom, so the temporary file has another
    // ending. Other users may be able to write to the directory, so an existing file with the
    // temporary name is neither followed nor written to.
    let new = format!("{path}.new");
    match std::fs::remove_file(&new) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o644)
        .open(&new)?
        .write_all(text.as_bytes())?;
    std::fs::rename(new, path)
}

fn render(figures: &Figures, out: &mut String) {
    let name = "snapshotter_snapshots";
    let help = "Snapshots, by kind and by the volume of their directory.";
    head(out, Kind::Gauge, name, help);
    for held in &figures.snapshots {
        let volume = held
            .volume
            .map_or_else(|| "none".to_owned(), |volume| volume.to_string());
        let labels = [("kind", held.kind.word()), ("volume", &volume)];
        line(out, name, &labels, held.count);
    }
    type Figure = fn(&VolumeFigures) -> u64;
    let of_volumes: [(&str, &str, Figure); 3] = [
        (
            "snapshotter_volume_size_bytes",
            "Size of a volume's file system.",
            |volume| volume.size_bytes,
        ),
        (
            "snapshotter_volume_free_bytes",
            "Bytes free on a volume.",
            |volume| volume.free_bytes,
        ),
        (
            "snapshotter_volume_usable",
            "Whether a volume is there and its disk has not failed.",
            |volume| volume.is_usable.into(),
        ),
    ];
    for (name, help, figure) in of_volumes {
        head(out, Kind::Gauge, name, help);
        for volume in &figures.volumes {
            let label = volume.volume.to_string();
            line(out, name, &[("volume", &label)], figure(volume));
        }
    }
    let name = "snapshotter_usages_total";
    let help = "Usage requests answered for active snapshots, by the source of the figure.";
    head(out, Kind::Counter, name, help);
    let usages = &figures.usages;
    for (by, count) in [
        ("quota", usages.by_quota),
        ("walk", usages.by_walk),
        ("shared-walk", usages.by_shared_walk),
        ("earlier-walk", usages.by_earlier_walk),
    ] {
        line(out, name, &[("by", by)], count);
    }
    render_single(figures, out);
    if let Some(check) = &figures.deep_check {
        for (name, help, value) in [
            (
                "snapshotter_deep_check_end_seconds",
                "When the last deep check ended, in seconds since 1970.",
                check.ended,
            ),
            (
                "snapshotter_deep_check_compared_layers",
                "Layers that the last deep check has compared.",
                check.compared,
            ),
            (
                "snapshotter_deep_check_damaged_layers",
                "Layers that the last deep check has found damaged, and that have not healed.",
                check.damaged,
            ),
        ] {
            head(out, Kind::Gauge, name, help);
            line(out, name, &[], value);
        }
    }
}

/// Writes the figures without labels.
fn render_single(figures: &Figures, out: &mut String) {
    for (kind, name, help, value) in [
        (
            Kind::Gauge,
            "snapshotter_quota_enforced",
            "Whether project quotas enforce limits on the writable volume.",
            (figures.quotas == Some(Support::Limits)).into(),
        ),
        (
            Kind::Gauge,
            "snapshotter_projects",
            "Project ids given to snapshots.",
            figures.projects,
        ),
        (
            Kind::Gauge,
            "snapshotter_away_bytes",
            "Bytes of layers that have not moved to the image volume yet.",
            figures.away_bytes,
        ),
        (
            Kind::Gauge,
            "snapshotter_held_bytes",
            "Bytes in old directories of moved layers that something may have mounted.",
            figures.held_bytes,
        ),
        (
            Kind::Gauge,
            "snapshotter_lost_layers",
            "Layers that were missing at the last start.",
            figures.lost_layers,
        ),
        (
            Kind::Gauge,
            "snapshotter_degraded",
            "Whether a volume cannot be used, or a layer is lost.",
            figures.is_degraded().into(),
        ),
        (
            Kind::Counter,
            "snapshotter_relocations_total",
            "Layers moved to the image volume since the start.",
            figures.relocations,
        ),
        (
            Kind::Counter,
            "snapshotter_relocated_bytes_total",
            "Bytes copied by moves of layers to the image volume.",
            figures.relocated_bytes,
        ),
        (
            Kind::Counter,
            "snapshotter_relocation_failures_total",
            "Moves of layers to the image volume that have failed.",
            figures.relocation_failures,
        ),
    ] {
        head(out, kind, name, help);
        line(out, name, &[], value);
    }
}
