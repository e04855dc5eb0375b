//! Comparing the disks after a power cut with what was acknowledged.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::fs::statvfs;

use overlay_read_write_splitting_snapshotter::proto::snapshots::Info;

use crate::content;
use crate::load::snapshot;
use crate::model::{History, LABEL_LIMIT, Request, Snapshot, State};
use crate::support::client::Client;
use crate::support::daemon::BINARY;
use crate::support::mounted::upper_of;

/// The label of `--upperdir-label`: the directory of a layer's files.
pub const LABEL_UPPERDIR: &str = "containerd.io/snapshot/overlay.upperdir";

/// The result of comparing the disks.
#[derive(Default)]
pub struct Verdict {
    /// How many layers were compared.
    pub layers: usize,
    /// The acknowledged layers that are not whole.
    pub damaged: BTreeSet<String>,
    /// Everything that is wrong.
    pub findings: Vec<String>,
}

/// Compares, and takes over the results of requests that were under way.
pub fn verify(client: &Client, seed: u64, history: &mut History) -> Verdict {
    let mut look = Look {
        client,
        seed,
        found: found(client),
        verdict: Verdict::default(),
    };
    for request in std::mem::take(&mut history.under_way).into_values() {
        look.settle(&request, &mut history.state);
    }
    for (key, wanted) in &history.state {
        let problem = look.problem(key, Some(wanted));
        look.verdict.layers += usize::from(wanted.is_layer);
        if let Some(problem) = problem {
            if wanted.is_layer {
                look.verdict.damaged.insert(key.clone());
            }
            look.verdict.findings.push(format!("{key:?} {problem}"));
        }
    }
    let strangers = look
        .found
        .keys()
        .filter(|key| !history.state.contains_key(*key));
    let strangers = strangers.map(|key| match history.gone.contains(key) {
        true => format!("{key:?} is there again"),
        false => format!("{key:?} was never asked for"),
    });
    look.verdict.findings.extend(strangers);
    look.verdict
}

/// A snapshot as the daemon returns it, and the directory of its files.
type Found = BTreeMap<String, (Snapshot, String)>;

fn found(client: &Client) -> Found {
    let all: Vec<Info> = client.list_pages(&[]).unwrap().concat();
    let all = all.iter().map(|info| {
        let mut snapshot = snapshot(info);
        let path = snapshot.labels.remove(LABEL_UPPERDIR).unwrap_or_default();
        (info.name.clone(), (snapshot, path))
    });
    all.collect()
}

struct Look<'a> {
    client: &'a Client,
    seed: u64,
    found: Found,
    verdict: Verdict,
}

impl Look<'_> {
    /// Checks that a request under way was done completely, or not at all.
    fn settle(&mut self, request: &Request, state: &mut State) {
        let before = state.clone();
        let mut after = state.clone();
        request.apply(&mut after);
        let mut problems = Vec::new();
        for outcome in [after, before] {
            let keys = request.keys();
            let problem = keys.iter().find_map(|key| {
                let problem = self.problem(key, outcome.get(*key))?;
                Some(format!("{key:?} {problem}"))
            });
            match problem {
                None => {
                    *state = outcome;
                    return;
                }
                Some(problem) => problems.push(problem),
            }
        }
        self.verdict.findings.push(format!(
            "{request:?} was under way: done, but {}; not done, but {}",
            problems[0], problems[1]
        ));
    }

    /// How a snapshot differs from what it should be; `None` if it does not.
    fn problem(&self, key: &str, wanted: Option<&Snapshot>) -> Option<String> {
        let (wanted, (found, path)) = match (wanted, self.found.get(key)) {
            (None, None) => return None,
            (None, Some(_)) => return Some("is there".to_owned()),
            (Some(_), None) => return Some("is missing".to_owned()),
            (Some(wanted), Some(found)) => (wanted, found),
        };
        if wanted != found {
            return Some(format!("is {found:?}, wanted {wanted:?}"));
        }
        match wanted.is_layer {
            true => self.layer_problem(key, path),
            false => self.active_problem(key, wanted),
        }
    }

    fn layer_problem(&self, name: &str, path: &str) -> Option<String> {
        let found = match content::read(Path::new(path)) {
            Ok(found) => found,
            Err(error) => return Some(format!("cannot be read: {path}: {error}")),
        };
        let wanted = content::of_layer(self.seed, name);
        if let Some(difference) = content::difference(&wanted, &found) {
            return Some(format!("is damaged: {path}: {difference}"));
        }
        match self.client.usage(name) {
            Ok(usage) if usage.inodes == content::inodes(&found) as i64 => None,
            other => Some(format!(
                "has {} inodes, but its usage is {other:?}",
                content::inodes(&found)
            )),
        }
    }

    /// Data that a container had not flushed may be lost, but not its
    /// directory.
    fn active_problem(&self, key: &str, wanted: &Snapshot) -> Option<String> {
        match self.client.mounts(key) {
            Err(refusal) => Some(format!("cannot be mounted: {refusal:?}")),
            Ok(mounts) if !upper_of(&mounts).is_dir() => Some(format!("has nothing at {mounts:?}")),
            Ok(mounts) => limit_problem(&upper_of(&mounts), wanted),
        }
    }
}

/// A directory with a limit shows the limit as the size of its disk, after a start
/// perhaps a moment later.
fn limit_problem(upper: &Path, wanted: &Snapshot) -> Option<String> {
    let limit = wanted.labels.get(LABEL_LIMIT)?;
    let begun = Instant::now();
    loop {
        let disk = statvfs(upper).unwrap();
        let size = format!("{}M", (disk.f_blocks * disk.f_frsize) >> 20);
        if size == *limit {
            return None;
        }
        if begun.elapsed() > Duration::from_secs(10) {
            return Some(format!("is limited to {size}, wanted {limit}"));
        }
        sleep(Duration::from_millis(2));
    }
}

/// Fails unless the daemon's own check of the database and disks finds nothing.
pub fn require_sound(places: &[String]) {
    if let Some(problem) = problem_of(places) {
        panic!("{problem}");
    }
}

/// What the daemon's own check of the database and disks finds.
pub fn problem_of(places: &[String]) -> Option<String> {
    let output = Command::new(BINARY)
        .arg("check")
        .args(places)
        .output()
        .unwrap();
    let problem = || {
        format!(
            "check: {}\n{}{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        )
    };
    // The failure of a disk is reported as long as snapshots from that time are left.
    let said = String::from_utf8_lossy(&output.stdout);
    let is_known = said.contains("has failed to write data") && said.contains("\n1 findings");
    (!output.status.success() && !is_known).then(problem)
}
