//! What `check` says, to people and to programs.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;

use serde_json::{Value, json};

use super::{Outcome, image_of, split_key};
use crate::config::Format;
use crate::snapshotter::{Finding, Inspection};
use crate::store::Snapshot;
use crate::types::{Kind, Quoted};

/// Everything that a check has to tell.
pub(super) struct Report {
    is_running: bool,
    snapshots: usize,
    findings: Vec<Finding>,
    doomed: Vec<Snapshot>,
    /// What is left, once a repair has been made.
    left: Option<Vec<Finding>>,
}

/// The layers that are lost to one of containerd's namespaces.
#[derive(Default)]
struct Loss<'a> {
    images: BTreeSet<&'a str>,
    layers: BTreeSet<&'a str>,
    containers: BTreeSet<&'a str>,
}

impl Report {
    pub(super) fn new(is_running: bool, inspection: Inspection) -> Report {
        Report {
            is_running,
            snapshots: inspection.snapshots,
            findings: inspection.findings,
            doomed: Vec::new(),
            left: None,
        }
    }

    /// Adds the snapshots that a repair drops.
    pub(super) fn doom(&mut self, doomed: Vec<Snapshot>) {
        self.doomed = doomed;
    }

    /// Adds what a look after the repair has found.
    pub(super) fn mended(&mut self, after: Inspection) {
        self.snapshots = after.snapshots;
        self.left = Some(after.findings);
    }

    pub(super) fn findings(&self) -> &[Finding] {
        &self.findings
    }

    pub(super) fn is_clean(&self) -> bool {
        self.left.as_ref().unwrap_or(&self.findings).is_empty()
    }

    pub(super) fn outcome(&self) -> Outcome {
        match self.is_clean() {
            true => Outcome::Clean,
            false => Outcome::Findings,
        }
    }

    /// What a repair would do, before it does it.
    pub(super) fn question(&self) -> String {
        match self.doomed.len() {
            0 => "The repair drops no snapshot.".to_owned(),
            number => format!("The repair drops the {number} snapshots named above."),
        }
    }

    pub(super) fn print(&self, format: Format) {
        let text = match format {
            Format::Human => self.sentences(),
            Format::Json => format!("{:#}\n", self.json()),
        };
        // A closed pipe (`check | head`) is no failure.
        let _ = std::io::stdout().write_all(text.as_bytes());
    }

    fn sentences(&self) -> String {
        let mut text = String::new();
        match &self.left {
            None => {
                let daemon = if self.is_running {
                    "running"
                } else {
                    "stopped"
                };
                text.push_str(&format!("{} snapshots, daemon {daemon}\n", self.snapshots));
                tell(&mut text, &self.findings);
                self.tell_losses(&mut text, "a repair drops");
            }
            Some(left) => {
                text.push_str("\nrepaired\n");
                tell(&mut text, left);
                self.tell_losses(&mut text, "dropped");
            }
        }
        text
    }

    fn tell_losses(&self, text: &mut String, dropped: &str) {
        for (namespace, loss) in self.losses() {
            text.push_str(&format!(
                "\n{dropped} in containerd's namespace {}:\n",
                Quoted(namespace)
            ));
            for layer in &loss.layers {
                text.push_str(&format!("  layer {}\n", Quoted(layer)));
            }
            for container in &loss.containers {
                text.push_str(&format!("  snapshot {}\n", Quoted(container)));
            }
            text.push_str(
                "afterwards, remove the images that use these layers and pull them again",
            );
            if loss.images.is_empty() {
                text.push_str(
                    ";\n`ctr -n NAMESPACE images check` tells which are no longer unpacked\n",
                );
                continue;
            }
            text.push_str(", among them:\n");
            for image in &loss.images {
                text.push_str(&format!("  image {}\n", Quoted(image)));
            }
        }
    }

    fn losses(&self) -> BTreeMap<&str, Loss<'_>> {
        let mut losses = BTreeMap::<&str, Loss<'_>>::new();
        for snapshot in &self.doomed {
            let (namespace, name) = split_key(&snapshot.info.name);
            let loss = losses.entry(namespace.unwrap_or("?")).or_default();
            loss.images.extend(image_of(snapshot));
            match snapshot.info.kind {
                Kind::Committed => loss.layers.insert(name),
                Kind::Active | Kind::View => loss.containers.insert(name),
            };
        }
        losses
    }

    fn json(&self) -> Value {
        let mut value = json!({
            "daemon": if self.is_running { "running" } else { "stopped" },
            "snapshots": self.snapshots,
            "findings": self.left.as_ref().unwrap_or(&self.findings).iter()
                .map(finding_json).collect::<Vec<_>>(),
            "dropped": self.doomed.iter().map(|snapshot| json!({
                "key": snapshot.info.name,
                "kind": snapshot.info.kind.word(),
                "image": image_of(snapshot),
            })).collect::<Vec<_>>(),
        });
        if self.left.is_some() {
            value["repaired"] = self.findings.iter().map(finding_json).collect();
        }
        value
    }
}

fn tell(text: &mut String, findings: &[Finding]) {
    if findings.is_empty() {
        text.push_str("clean\n");
        return;
    }
    for finding in findings {
        text.push_str(&format!("\n{finding}\n"));
        match finding.problem.remedy() {
            Some(remedy) => text.push_str(&format!("  a repair {remedy}\n")),
            None => text.push_str("  no repair can help\n"),
        }
    }
    text.push_str(&format!("\n{} findings\n", findings.len()));
}

fn finding_json(finding: &Finding) -> Value {
    json!({
        "code": finding.problem.code(),
        "text": finding.to_string(),
        "key": finding.name,
        "id": finding.id.map(|id| id.number()),
        "volume": finding.volume.map(|volume| volume.to_string()),
        "repair": finding.problem.remedy(),
    })
}
