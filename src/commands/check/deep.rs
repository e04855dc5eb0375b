//! Compares layers with containerd's content, and heals layers that differ.
//!
//! Owns: which content a layer is compared with, the order of layers, and how an interrupted
//! command ends. Never: compares trees or replaces layers, which is the snapshotter's task.

use std::collections::{HashMap, HashSet};
use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::flag;

use crate::commands::losses::{image_of, split_key};
use crate::commands::output;
use crate::commands::progress::Progress;
use crate::config::{CheckOptions, Format};
use crate::containerd::{Containerd, LayerSource, Sources, Standing};
use crate::error::{Error, ErrorKind, Result};
use crate::service::HealingClient;
use crate::snapshotter::{Compared, Finding, Problem, Snapshotter, Unpacking};
use crate::store::Snapshot;
use crate::tree::Differences;
use crate::types::{Quoted, SnapshotId};
use crate::util::threads::lower_io_priority;

/// The results of a deep check.
#[derive(Default)]
pub(super) struct Deep {
    /// How many layers were compared.
    pub compared: usize,
    /// How many of the compared layers are sound.
    pub sound: usize,
    pub healed: Vec<Healed>,
    /// The damaged layers that have not been healed.
    pub findings: Vec<Finding>,
    pub not_compared: Vec<NotCompared>,
    /// Errors about containerd's images that could not be read.
    pub problems: Vec<String>,
}

impl Deep {
    /// The result if nothing could be compared.
    pub(super) fn failed(error: &Error) -> Deep {
        Deep {
            problems: vec![format!("no layer was healed: {}", error.chain())],
            ..Deep::default()
        }
    }
}

/// A layer that was damaged.
pub(super) struct Healed {
    pub key: String,
    pub differences: Differences,
    /// The keys of the snapshots that still have the damaged files mounted.
    pub restart: Vec<String>,
}

/// A layer that was not compared, or was not healed.
pub(super) struct NotCompared {
    pub key: String,
    pub why: String,
    /// Whether this counts as a failure of the check. It does if containerd has the layer's
    /// content.
    pub has_failed: bool,
    /// What the user can do about it.
    pub remedy: Option<String>,
}

/// Which layers are compared.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Layers {
    /// All layers.
    All,
    /// Only layers with damage that healing may repair.
    Broken,
}

/// The task of a deep check.
pub(super) struct Task<'a> {
    pub layers: Layers,
    /// Whether layers that differ are healed.
    pub heals: bool,
    /// `None` if results are not recorded and layers are not replaced.
    pub writer: Option<&'a Writer<'a>>,
}

/// Who records results and replaces layers: this process or the daemon.
pub(super) enum Writer<'a> {
    /// This process does it. It has the root's lock.
    Alone(&'a Snapshotter),
    /// The daemon does it, because it is running.
    Daemon(HealingClient),
}

impl Writer<'_> {
    fn heal(&self, layer: &Snapshot, unpacking: &Unpacking<'_>) -> Result<Vec<String>> {
        let (name, id) = (&layer.info.name, layer.id);
        let unpacked = unpacking.hand_over()?;
        match self {
            Writer::Daemon(daemon) => daemon.heal(name, id, &unpacked),
            Writer::Alone(snapshotter) => {
                let mounted = snapshotter.heal_layer(name, id, &unpacked)?;
                snapshotter.drop_damaged()?;
                Ok(mounted)
            }
        }
    }

    fn record_sound(&self, layer: &Snapshot, digest: &str) -> Result<()> {
        let (name, id) = (&layer.info.name, layer.id);
        match self {
            Writer::Daemon(daemon) => daemon.record_sound(name, id, digest),
            Writer::Alone(snapshotter) => snapshotter.record_sound(name, id, digest),
        }
    }

    /// Records the result of the check, for the daemon's figures.
    pub(super) fn record_result(&self, deep: &Deep) -> Result<()> {
        let (compared, damaged) = (deep.compared as u64, deep.findings.len() as u64);
        match self {
            Writer::Daemon(daemon) => daemon.record_deep_check(compared, damaged),
            Writer::Alone(snapshotter) => snapshotter.record_deep_check(compared, damaged),
        }
    }
}

/// Compares layers with their recorded digests. A layer that has no recorded digest, or has
/// another digest now, is compared with containerd's content. `findings` are the results of the
/// check that counts files.
///
/// # Errors
///
/// [`ErrorKind::Cancelled`] after a signal, [`ErrorKind::Unavailable`] if containerd is
/// needed and does not answer. In both cases, no layer is half healed.
pub(super) fn run(
    snapshotter: &Snapshotter,
    findings: &[Finding],
    task: Task<'_>,
    options: &CheckOptions,
) -> Result<Deep> {
    lower_io_priority("this check");
    let cancel = interruption()?;
    let broken = findings
        .iter()
        .filter(|one| one.problem.healing().is_some());
    let broken: HashSet<_> = broken.filter_map(|finding| finding.id).collect();
    let mut layers = snapshotter.layers_in_order()?;
    let parents = layers.iter().map(|layer| (layer.id, layer.parent_id));
    let parents = parents.collect();
    layers.retain(|layer| task.layers == Layers::All || broken.contains(&layer.id));
    let containerd = Containerd::new(&options.containerd_address, &cancel);
    let mut pace = Pace::new(&layers, options);
    let mut check = DeepCheck {
        containerd: &containerd,
        unpacking: snapshotter.begin_unpacking(&cancel)?,
        digests: snapshotter.store().read()?.digests()?,
        task,
        parents,
        broken,
        miscounted: findings.iter().filter_map(|finding| finding.id).collect(),
        deep: Deep::default(),
    };
    if let Some(Writer::Alone(snapshotter)) = check.task.writer {
        snapshotter.drop_damaged()?;
    }
    let mut rest = Vec::new();
    for layer in layers {
        pace.show();
        match check.is_as_recorded(&layer)? {
            true => pace.end(&layer, "sound"),
            false => rest.push(layer),
        }
    }
    if rest.is_empty() {
        return Ok(check.deep);
    }
    let keys = rest.iter().map(|layer| split_key(&layer.info.name));
    let keys: HashSet<_> = keys.collect();
    let is_wanted = |namespace: &str, name: &str| keys.contains(&(namespace, name));
    let sources = Sources::find(&containerd, &is_wanted)?;
    for layer in &rest {
        pace.show();
        let word = check.layer(layer, &sources)?;
        pace.end(layer, word);
    }
    check.deep.problems = sources.problems;
    Ok(check.deep)
}

/// A flag that the first signal sets. A second signal ends the command at once.
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
    unpacking: Unpacking<'a>,
    /// The recorded digests of sound layers.
    digests: HashMap<SnapshotId, String>,
    task: Task<'a>,
    /// The parent of each layer.
    parents: HashMap<SnapshotId, Option<SnapshotId>>,
    /// Layers that are known to be damaged, or missing.
    broken: HashSet<SnapshotId>,
    /// Layers whose record may differ from their content.
    miscounted: HashSet<SnapshotId>,
    deep: Deep,
}

impl DeepCheck<'_> {
    /// Whether a layer is unchanged since it was found sound.
    fn is_as_recorded(&mut self, layer: &Snapshot) -> Result<bool> {
        let Some(recorded) = self.digests.get(&layer.id) else {
            return Ok(false);
        };
        match self.unpacking.digest(layer) {
            Err(error) if error.kind() == ErrorKind::Cancelled => return Err(error),
            // An unreadable layer is not sound.
            Err(_) => return Ok(false),
            Ok(None) => {
                self.digests.remove(&layer.id);
                return Ok(false);
            }
            Ok(Some(found)) if found != *recorded => return Ok(false),
            Ok(Some(_)) => {}
        }
        if self.miscounted.contains(&layer.id)
            && let Some(writer) = self.task.writer
        {
            writer.record_sound(layer, recorded)?;
        }
        self.broken.remove(&layer.id);
        self.deep.compared += 1;
        self.deep.sound += 1;
        Ok(true)
    }

    fn stands_on_broken(&self, layer: &Snapshot) -> bool {
        let mut next = layer.parent_id;
        while let Some(below) = next {
            if self.broken.contains(&below) {
                return true;
            }
            next = self.parents.get(&below).copied().flatten();
        }
        false
    }

    /// Compares one layer with containerd's content. Returns a word that describes the result.
    fn layer(&mut self, layer: &Snapshot, sources: &Sources) -> Result<&'static str> {
        let (namespace, name) = split_key(&layer.info.name);
        let all = sources.of(namespace, name);
        let missing = all.partition_point(|source| source.standing != Standing::Missing);
        let (there, missing) = all.split_at(missing);
        if there.is_empty() {
            let (why, remedy) = match missing.first() {
                Some(source) => {
                    let digest = Quoted(&source.blob.digest);
                    let why = format!("containerd has not kept the content of the layer, {digest}");
                    (why, Some(fetch(namespace, &source.image)))
                }
                None => unknown(layer),
            };
            if self.digests.contains_key(&layer.id) {
                self.deep.compared += 1;
                let what = "the layer has changed since it was found sound";
                self.find(layer, Differences::whole(what));
            }
            return Ok(self.skip(layer, why, remedy, false));
        }
        // An unpack takes over modes of directories from the layers below, so these have to be
        // sound.
        if self.task.heals && self.stands_on_broken(layer) {
            self.broken.insert(layer.id);
            let why = "a layer below this one could not be healed".to_owned();
            return Ok(self.skip(layer, why, None, true));
        }
        // Several sources are tried, because an image can name wrong content for a layer of
        // another image.
        let mut first_failure = None;
        for source in there {
            match self.compare(layer, source) {
                Ok(word) => return Ok(word),
                Err(error) => match error.kind() {
                    ErrorKind::Cancelled | ErrorKind::Unavailable => return Err(error),
                    kind => {
                        let is_full = kind == ErrorKind::ResourceExhausted;
                        let remedy = (!is_full).then(|| fetch_again(source));
                        first_failure.get_or_insert((error.chain(), remedy));
                    }
                },
            }
        }
        let (why, remedy) = first_failure.unwrap_or_else(|| unknown(layer));
        Ok(self.skip(layer, why, remedy, true))
    }

    fn compare(&mut self, layer: &Snapshot, source: &LayerSource) -> Result<&'static str> {
        let unpack = |mount: &_, watch: &dyn Fn() -> Result<()>| {
            let digest = self.containerd.unpack(source, mount, watch)?;
            if digest == source.diff_id {
                return Ok(());
            }
            Err(Error::data_loss(format!(
                "containerd's content {} is damaged: its digest after unpacking is {}, and has \
                 to be {}",
                Quoted(&source.blob.digest),
                Quoted(&digest),
                Quoted(&source.diff_id)
            )))
        };
        let compared = self.unpacking.compare(layer, unpack)?;
        self.deep.compared += usize::from(compared != Compared::Gone);
        match compared {
            Compared::Gone => Ok("removed meanwhile"),
            Compared::Sound => {
                if let Some(writer) = self.task.writer
                    && let Some(digest) = self.unpacking.digest(layer)?
                {
                    writer.record_sound(layer, &digest)?;
                }
                self.broken.remove(&layer.id);
                self.deep.sound += 1;
                Ok("sound")
            }
            Compared::Differs(differences) => match self.task.writer {
                Some(writer) if self.task.heals => self.heal(layer, differences, writer),
                _ => Ok(self.find(layer, differences)),
            },
        }
    }

    fn heal(
        &mut self,
        layer: &Snapshot,
        differences: Differences,
        writer: &Writer<'_>,
    ) -> Result<&'static str> {
        match writer.heal(layer, &self.unpacking) {
            Ok(restart) => {
                self.broken.remove(&layer.id);
                self.deep.healed.push(Healed {
                    key: layer.info.name.clone(),
                    differences,
                    restart,
                });
                Ok("healed")
            }
            Err(error) if error.kind() == ErrorKind::Unavailable => Err(error),
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
        match self.task.heals {
            true => "not healed",
            false => "not compared",
        }
    }
}

/// The reason why no content is known for a layer, and what the user can do about that.
fn unknown(layer: &Snapshot) -> (String, Option<String>) {
    let (namespace, name) = split_key(&layer.info.name);
    if !name.starts_with("sha256:") {
        return ("the layer was not unpacked from an image".to_owned(), None);
    }
    let why = format!(
        "no image in containerd's namespace {} has this layer",
        Quoted(namespace)
    );
    let image = image_of(&layer.info).unwrap_or_default();
    (why, Some(fetch(namespace, image)))
}

/// The command with which containerd downloads the content of an image again.
fn fetch(namespace: &str, image: &str) -> String {
    let (namespace, image) = (word(namespace, "NAMESPACE"), word(image, "IMAGE"));
    format!("`ctr -n {namespace} content fetch {image}` downloads the content again")
}

/// The commands that replace damaged content.
fn fetch_again(source: &LayerSource) -> String {
    let namespace = word(&source.namespace, "NAMESPACE");
    let (image, digest) = (
        word(&source.image, "IMAGE"),
        word(&source.blob.digest, "DIGEST"),
    );
    format!(
        "if containerd's content is damaged, run `ctr -n {namespace} content rm {digest}`, and \
         then `ctr -n {namespace} content fetch {image}`"
    )
}

/// Returns `text` if a shell takes it literally, and otherwise the placeholder `otherwise`:
/// names come from untrusted sources, and users paste these commands into a shell.
fn word<'a>(text: &'a str, otherwise: &'static str) -> &'a str {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "._/:@-".contains(c);
    match !text.is_empty() && !text.starts_with('-') && text.chars().all(is_plain) {
        true => text,
        false => otherwise,
    }
}

/// The progress of the check.
struct Pace {
    progress: Progress,
    /// Whether each layer gets a line.
    has_lines: bool,
    begun: Instant,
    layers: usize,
    bytes: u64,
    done: usize,
    done_bytes: u64,
}

impl Pace {
    fn new(layers: &[Snapshot], options: &CheckOptions) -> Pace {
        Pace {
            progress: Progress::new("comparing"),
            has_lines: options.format == Format::Human && !std::io::stderr().is_terminal(),
            begun: Instant::now(),
            layers: layers.len(),
            bytes: layers.iter().map(|layer| layer.usage.size_bytes).sum(),
            done: 0,
            done_bytes: 0,
        }
    }

    /// Notes that a layer is done, with this result.
    fn end(&mut self, layer: &Snapshot, word: &str) {
        if self.has_lines {
            output::print(&format!("{word}: {}\n", Quoted(&layer.info.name)));
        }
        self.done += 1;
        self.done_bytes += layer.usage.size_bytes;
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
