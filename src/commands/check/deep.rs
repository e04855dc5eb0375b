//! Comparing layers with what containerd unpacks them from, and healing them.
//!
//! Owns: which layer is compared with what, in which order, and how an interrupted command
//! ends. Never: how trees are compared or layers replaced; that is the snapshotter's.

use std::collections::HashSet;
use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::flag;

use crate::commands::losses::{image_of, split_key};
use crate::commands::output;
use crate::commands::progress::Progress;
use crate::config::{CheckOptions, Depth, Format};
use crate::containerd::{Containerd, LayerSource, Sources};
use crate::error::{Error, ErrorKind, Result};
use crate::snapshotter::{Compared, Finding, Problem, Snapshotter, Unpacking};
use crate::store::Snapshot;
use crate::sys;
use crate::tree::Differences;
use crate::types::{Quoted, SnapshotId};

/// What a deep check has come to.
#[derive(Default)]
pub(super) struct Deep {
    /// How many layers were compared.
    pub compared: usize,
    /// How many of them are what they should be.
    pub sound: usize,
    pub healed: Vec<Healed>,
    /// What is damaged and has not healed.
    pub findings: Vec<Finding>,
    pub not_compared: Vec<NotCompared>,
    /// What could not be read of containerd's images.
    pub problems: Vec<String>,
}

/// A layer that was damaged.
pub(super) struct Healed {
    pub key: String,
    pub differences: Differences,
    /// The keys of snapshots that go on with the damaged files.
    pub restart: Vec<String>,
}

/// A layer that was not compared, or has not healed.
pub(super) struct NotCompared {
    pub key: String,
    pub why: String,
    /// Whether it could have been: the check has not seen all that it should.
    pub has_failed: bool,
    /// What would change that.
    pub remedy: Option<String>,
}

/// Compares all layers, and heals those that differ if that is asked for. `findings` are
/// those of the counts.
///
/// # Errors
///
/// [`ErrorKind::Cancelled`] after a signal, [`ErrorKind::Unavailable`] without containerd.
/// Nothing is half healed then.
pub(super) fn run(
    snapshotter: &Snapshotter,
    findings: &[Finding],
    options: &CheckOptions,
) -> Result<Deep> {
    if let Err(errno) = sys::lower_io_priority() {
        log::debug!("the check has no idle I/O priority: {errno}");
    }
    let cancel = interruption()?;
    let layers = snapshotter.layers_in_order()?;
    let keys = layers.iter().map(|layer| split_key(&layer.info.name));
    let keys: HashSet<_> = keys.collect();
    let containerd = Containerd::new(&options.containerd_address, &cancel);
    let is_wanted = |namespace: &str, name: &str| keys.contains(&(namespace, name));
    let sources = Sources::find(&containerd, &is_wanted)?;
    let unpacking = snapshotter.begin_unpacking(&cancel)?;
    let broken = findings
        .iter()
        .filter(|one| one.problem.healing().is_some());
    let mut check = DeepCheck {
        containerd: &containerd,
        sources: &sources,
        unpacking,
        heals: options.depth == Depth::Heal,
        broken: broken.filter_map(|finding| finding.id).collect(),
        miscounted: findings.iter().filter_map(|finding| finding.id).collect(),
        deep: Deep::default(),
    };
    let has_lines = options.format == Format::Human && !std::io::stderr().is_terminal();
    let mut pace = Pace::new(&layers);
    for layer in &layers {
        pace.show();
        let word = check.layer(layer)?;
        if has_lines {
            output::print(&format!("{word}: {}\n", Quoted(&layer.info.name)));
        }
        pace.done += 1;
        pace.done_bytes += layer.usage.size_bytes;
    }
    check.deep.problems.clone_from(&sources.problems);
    Ok(check.deep)
}

/// A flag that the first signal sets. The second one ends the command at once.
fn interruption() -> Result<Arc<AtomicBool>> {
    let cancel = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        flag::register_conditional_shutdown(signal, 2, Arc::clone(&cancel))
            .and_then(|_| flag::register(signal, Arc::clone(&cancel)))
            .map_err(|error| Error::caused(ErrorKind::Internal, "wait for signals", error))?;
    }
    Ok(cancel)
}

struct DeepCheck<'a> {
    containerd: &'a Containerd<'a>,
    sources: &'a Sources,
    unpacking: Unpacking<'a>,
    heals: bool,
    /// Layers that are known to be damaged, or missing.
    broken: HashSet<SnapshotId>,
    /// Layers of which something else than their content is recorded, perhaps.
    miscounted: HashSet<SnapshotId>,
    deep: Deep,
}

impl DeepCheck<'_> {
    /// Compares one layer. Returns a word for what came of it.
    fn layer(&mut self, layer: &Snapshot) -> Result<&'static str> {
        let (namespace, name) = split_key(&layer.info.name);
        let Some(source) = self.sources.of(namespace, name) else {
            let (why, remedy) = unknown(layer);
            return Ok(self.skip(layer, why, remedy, false));
        };
        if !source.is_there {
            let why = format!("containerd has not kept its content {}", source.blob.digest);
            let remedy = fetch(namespace, &source.image);
            return Ok(self.skip(layer, why, Some(remedy), false));
        }
        // An unpack takes the modes of directories from the layers below.
        let stands_on_broken = layer
            .parent_id
            .is_some_and(|below| self.broken.contains(&below));
        if self.heals && stands_on_broken {
            self.broken.insert(layer.id);
            let why = "it stands on a layer that could not be healed".to_owned();
            return Ok(self.skip(layer, why, None, true));
        }
        match self.compare(layer, source) {
            Ok(word) => Ok(word),
            Err(error) => match error.kind() {
                ErrorKind::Cancelled | ErrorKind::Unavailable => Err(error),
                kind => {
                    let is_full = kind == ErrorKind::ResourceExhausted;
                    let remedy = (!is_full).then(|| fetch_again(source));
                    Ok(self.skip(layer, error.chain(), remedy, true))
                }
            },
        }
    }

    fn compare(&mut self, layer: &Snapshot, source: &LayerSource) -> Result<&'static str> {
        let unpack = |mount: &_| {
            let digest = self.containerd.unpack(source, mount)?;
            if digest == source.diff_id {
                return Ok(());
            }
            Err(Error::data_loss(format!(
                "containerd's content {} is damaged: unpacked, its digest is {digest}, and has \
                 to be {}",
                source.blob.digest, source.diff_id
            )))
        };
        let compared = self.unpacking.compare(layer, unpack)?;
        self.deep.compared += usize::from(compared != Compared::Gone);
        match compared {
            Compared::Gone => Ok("removed meanwhile"),
            Compared::Sound => {
                if self.heals && self.miscounted.contains(&layer.id) {
                    self.unpacking.record_sound(layer)?;
                }
                self.broken.remove(&layer.id);
                self.deep.sound += 1;
                Ok("sound")
            }
            Compared::Differs(differences) if self.heals => self.heal(layer, differences),
            Compared::Differs(differences) => Ok(self.find(layer, differences)),
        }
    }

    fn heal(&mut self, layer: &Snapshot, differences: Differences) -> Result<&'static str> {
        match self.unpacking.heal(layer) {
            Ok(restart) => {
                self.broken.remove(&layer.id);
                self.deep.healed.push(Healed {
                    key: layer.info.name.clone(),
                    differences,
                    restart,
                });
                Ok("healed")
            }
            Err(error) => {
                self.broken.insert(layer.id);
                self.find(layer, differences);
                Ok(self.skip(layer, error.chain(), None, true))
            }
        }
    }

    fn find(&mut self, layer: &Snapshot, differences: Differences) -> &'static str {
        self.deep.findings.push(Finding {
            problem: Problem::LayerDiffers(differences),
            name: Some(layer.info.name.clone()),
            id: Some(layer.id),
            volume: layer.volume,
        });
        "damaged"
    }

    fn skip(
        &mut self,
        layer: &Snapshot,
        why: String,
        remedy: Option<String>,
        has_failed: bool,
    ) -> &'static str {
        self.deep.not_compared.push(NotCompared {
            key: layer.info.name.clone(),
            why,
            has_failed,
            remedy,
        });
        match self.heals {
            true => "not healed",
            false => "not compared",
        }
    }
}

/// Why no content is known for a layer, and what would change that.
fn unknown(layer: &Snapshot) -> (String, Option<String>) {
    let (namespace, name) = split_key(&layer.info.name);
    if !name.starts_with("sha256:") {
        return ("it was not unpacked from an image".to_owned(), None);
    }
    let why = format!(
        "no image in containerd's namespace {} has it",
        Quoted(namespace)
    );
    let image = image_of(&layer.info).unwrap_or_default();
    (why, Some(fetch(namespace, image)))
}

/// How content comes back.
fn fetch(namespace: &str, image: &str) -> String {
    let (namespace, image) = (word(namespace, "NAMESPACE"), word(image, "IMAGE"));
    format!("`ctr -n {namespace} content fetch {image}` brings its content back")
}

/// How damaged content is replaced.
fn fetch_again(source: &LayerSource) -> String {
    let namespace = word(&source.namespace, "NAMESPACE");
    let (image, digest) = (
        word(&source.image, "IMAGE"),
        word(&source.blob.digest, "DIGEST"),
    );
    format!(
        "if it is the content that is damaged: `ctr -n {namespace} content rm {digest}`, and \
         then `ctr -n {namespace} content fetch {image}`"
    )
}

/// A word that a shell takes as it is, or what stands for it: names are strangers' words.
fn word<'a>(text: &'a str, otherwise: &'static str) -> &'a str {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "._/:@-".contains(c);
    match !text.is_empty() && !text.starts_with('-') && text.chars().all(is_plain) {
        true => text,
        false => otherwise,
    }
}

/// How far the check has come.
struct Pace {
    progress: Progress,
    begun: Instant,
    layers: usize,
    bytes: u64,
    done: usize,
    done_bytes: u64,
}

impl Pace {
    fn new(layers: &[Snapshot]) -> Pace {
        Pace {
            progress: Progress::new("comparing"),
            begun: Instant::now(),
            layers: layers.len(),
            bytes: layers.iter().map(|layer| layer.usage.size_bytes).sum(),
            done: 0,
            done_bytes: 0,
        }
    }

    fn show(&mut self) {
        let [done, all] = [self.done_bytes, self.bytes].map(output::bytes);
        let mut text = format!(
            "layer {} of {}, {done} of {all}",
            self.done + 1,
            self.layers
        );
        let elapsed = self.begun.elapsed();
        if elapsed > Duration::from_secs(5) && self.done_bytes > 0 {
            let left = self.bytes.saturating_sub(self.done_bytes) as f64 / self.done_bytes as f64;
            let minutes = elapsed.mul_f64(left).as_secs().div_ceil(60);
            text.push_str(&format!(", about {minutes} min left"));
        }
        self.progress.say(&text);
    }
}
