//! The reports of `check`, for people and for programs.

use serde_json::{Value, json};

use super::deep::Deep;
use crate::commands::losses::{image_of, losses};
use crate::commands::output;
use crate::config::Format;
use crate::snapshotter::{Finding, Inspection};
use crate::store::Snapshot;
use crate::types::Quoted;

/// What a report of `check` contains.
pub(super) struct CheckReport {
    is_running: bool,
    snapshots: usize,
    findings: Vec<Finding>,
    /// The paths of everything that is set aside.
    left_out: Vec<String>,
    /// The snapshots that a repair drops.
    doomed: Vec<Snapshot>,
    /// The results of a deep check.
    deep: Option<Deep>,
    /// The findings that are left after a repair.
    left: Option<Vec<Finding>>,
}

impl CheckReport {
    pub(super) fn new(
        is_running: bool,
        inspection: Inspection,
        doomed: Vec<Snapshot>,
        deep: Option<Deep>,
    ) -> CheckReport {
        CheckReport {
            is_running,
            snapshots: inspection.snapshots,
            findings: inspection.findings,
            left_out: inspection.left_out,
            doomed,
            deep,
            left: None,
        }
    }

    /// Adds the result of a second inspection, after the repair.
    pub(super) fn mended(&mut self, after: Inspection) {
        self.snapshots = after.snapshots;
        self.left_out = after.left_out;
        self.left = Some(after.findings);
    }

    pub(super) fn findings(&self) -> &[Finding] {
        &self.findings
    }

    pub(super) fn is_clean(&self) -> bool {
        let has_failed = |deep: &Deep| deep.not_compared.iter().any(|layer| layer.has_failed);
        match &self.left {
            // The repair has dropped the layers that could not be healed.
            Some(left) => left.is_empty(),
            None => self.findings.is_empty() && !self.deep.as_ref().is_some_and(has_failed),
        }
    }

    /// Describes what a repair would do.
    pub(super) fn question(&self) -> String {
        match self.doomed.len() {
            0 => "The repair drops no snapshot.".to_owned(),
            number => format!(
                "The repair drops the {number} snapshots named above; the files of those that are \
                 whole are set aside in left-out/."
            ),
        }
    }

    pub(super) fn print(&self, format: Format) {
        output::show(format, || self.sentences(), || self.json());
    }

    fn sentences(&self) -> String {
        let mut text = String::new();
        match &self.left {
            None => {
                let daemon = output::daemon_state(self.is_running);
                text.push_str(&format!("{} snapshots, daemon {daemon}\n", self.snapshots));
                if let Some(deep) = &self.deep {
                    add_deep(&mut text, deep);
                }
                if !self.findings.is_empty() || self.is_clean() {
                    tell(&mut text, &self.findings);
                }
                self.tell_losses(&mut text, "a repair drops");
            }
            Some(left) => {
                text.push_str("\nrepaired\n");
                tell(&mut text, left);
                self.tell_losses(&mut text, "dropped");
            }
        }
        for path in &self.left_out {
            text.push_str(&format!(
                "{path} was set aside: delete it if you do not need it\n"
            ));
        }
        text
    }

    fn tell_losses(&self, text: &mut String, dropped: &str) {
        for (namespace, loss) in losses(self.doomed.iter().map(|snapshot| &snapshot.info)) {
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
                "afterwards, remove the containers on these layers, remove the images that use \
                 them (`ctr images rm --sync`, or `docker rmi`), and pull them again",
            );
            if loss.images.is_empty() {
                text.push_str(
                    ";\n`ctr -n NAMESPACE images check` shows which are no longer unpacked\n",
                );
                continue;
            }
            text.push_str(", among them:\n");
            for image in &loss.images {
                text.push_str(&format!("  image {}\n", Quoted(image)));
            }
        }
    }

    fn json(&self) -> Value {
        let mut value = json!({
            "daemon": output::daemon_state(self.is_running),
            "snapshots": self.snapshots,
            "left_out": self.left_out,
            "findings": self.left.as_ref().unwrap_or(&self.findings).iter()
                .map(finding_json).collect::<Vec<_>>(),
            "dropped": self.doomed.iter().map(|snapshot| json!({
                "key": snapshot.info.name,
                "kind": snapshot.info.kind.word(),
                "image": image_of(&snapshot.info),
            })).collect::<Vec<_>>(),
        });
        if let Some(deep) = &self.deep {
            value["deep"] = deep_json(deep);
        }
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
        let healing = finding.problem.healing();
        if let Some(healing) = healing {
            text.push_str(&format!("  `check --heal` {healing}\n"));
        }
        match finding.problem.remedy() {
            Some(remedy) => text.push_str(&format!("  a repair {remedy}\n")),
            None if healing.is_some() => {}
            None => text.push_str("  no repair can help\n"),
        }
    }
    text.push_str(&format!("\n{} findings\n", findings.len()));
}

fn add_deep(text: &mut String, deep: &Deep) {
    text.push_str(&format!(
        "{} layers compared with containerd's content, {} of them sound\n",
        deep.compared, deep.sound
    ));
    for problem in &deep.problems {
        text.push_str(&format!("{problem}\n"));
    }
    for healed in &deep.healed {
        let (key, differences) = (Quoted(&healed.key), &healed.differences);
        text.push_str(&format!("\nhealed layer {key}: {differences}\n"));
        for key in &healed.restart {
            text.push_str(&format!(
                "  snapshot {} is mounted with the damaged files: restart its container\n",
                Quoted(key)
            ));
        }
    }
    for skipped in &deep.not_compared {
        let key = Quoted(&skipped.key);
        text.push_str(&format!(
            "\nlayer {key} cannot be compared: {}\n",
            skipped.why
        ));
        if let Some(remedy) = &skipped.remedy {
            text.push_str(&format!("  {remedy}\n"));
        }
    }
}

fn deep_json(deep: &Deep) -> Value {
    json!({
        "compared": deep.compared,
        "sound": deep.sound,
        "healed": deep.healed.iter().map(|healed| json!({
            "key": healed.key,
            "differences": healed.differences.first,
            "number": healed.differences.count,
            "restart": healed.restart,
        })).collect::<Vec<_>>(),
        "not_compared": deep.not_compared.iter().map(|skipped| json!({
            "key": skipped.key,
            "why": skipped.why,
            "failed": skipped.has_failed,
            "remedy": skipped.remedy,
        })).collect::<Vec<_>>(),
        "problems": deep.problems,
    })
}

fn finding_json(finding: &Finding) -> Value {
    json!({
        "code": finding.problem.code(),
        "text": finding.to_string(),
        "key": finding.name,
        "id": finding.id.map(|id| id.number()),
        "volume": finding.volume.map(|volume| volume.to_string()),
        "heal": finding.problem.healing(),
        "repair": finding.problem.remedy(),
    })
}
