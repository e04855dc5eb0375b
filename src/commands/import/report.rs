//! The reports of `import`, for people and for programs.

use std::collections::HashSet;
use std::path::Path;

use serde_json::{Value, json};

use super::is_away;
use super::plan::{LeftOut, Plan, belongs_to};
use crate::commands::losses::{image_of, losses};
use crate::commands::output::show;
use crate::config::{Config, Format, ImportTask};
use crate::store::Snapshot;
use crate::types::{Kind, Quoted, SnapshotId, Volume};

/// What a report of `import` contains.
pub(super) struct ImportReport<'a> {
    pub(super) plan: Plan,
    pub(super) task: ImportTask,
    pub(super) config: &'a Config,
}

impl ImportReport<'_> {
    pub(super) fn is_whole(&self) -> bool {
        self.plan.left_out.is_empty()
    }

    pub(super) fn print(&self, format: Format) {
        show(format, || self.sentences(), || self.json());
    }

    fn count(&self, kind: Kind) -> usize {
        let kept = self.plan.kept.iter();
        kept.filter(|snapshot| snapshot.info.kind == kind).count()
    }

    fn away(&self) -> impl Iterator<Item = &Snapshot> {
        self.plan.kept.iter().filter(|snapshot| is_away(snapshot))
    }

    /// Returns `done` after an import, and `would_be` after a dry run.
    fn by_task(&self, done: &'static str, would_be: &'static str) -> &'static str {
        match self.task {
            ImportTask::Look => would_be,
            ImportTask::Import | ImportTask::Undo => done,
        }
    }

    fn sentences(&self) -> String {
        let mut text = format!(
            "{} {} snapshots: {} layers, {} active, {} views\n",
            self.by_task("imported", "would import"),
            self.plan.kept.len(),
            self.count(Kind::Committed),
            self.count(Kind::Active),
            self.count(Kind::View),
        );
        let moved = self.by_task("move", "would move");
        list(
            &mut text,
            &format!(
                "layers that the original could not use after their commit; they are whole, and \
                 {moved}\nto the image volume while the daemon runs:"
            ),
            self.away()
                .map(|layer| Quoted(&layer.info.name).to_string()),
        );
        self.tell_shrunk(&mut text);
        self.tell_left_out(&mut text);
        self.tell_containers_data(&mut text);
        self.tell_strays(&mut text);
        self.tell_others(&mut text);
        match self.task {
            ImportTask::Look => text.push_str("\nnothing was changed\n"),
            ImportTask::Import | ImportTask::Undo => text.push_str(&format!(
                "\nthe original's database is {}/metadata.db.bbolt now; `import --undo` goes back \
                 to it\nas long as no snapshot has been made, changed, removed or moved\n",
                self.config.root
            )),
        }
        text
    }

    fn tell_shrunk(&self, text: &mut String) {
        let lines = self.plan.shrunk.iter().map(|found| {
            let (name, counted) = (Quoted(&found.name), found.counted_bytes >> 10);
            format!("{name}: {counted} KiB of {}", found.recorded_bytes >> 10)
        });
        list(
            text,
            "layers that take far less space than at their commit: a power cut may have \
             emptied\nfiles in them; if their images do not work, remove these images and pull \
             them again:",
            lines,
        );
    }

    fn tell_left_out(&self, text: &mut String) {
        let left_out = &self.plan.left_out;
        if left_out.is_empty() {
            return;
        }
        text.push_str(&format!(
            "\n{} {}:\n",
            self.by_task("left out", "would leave out"),
            left_out.len()
        ));
        for found in left_out {
            let info = &found.snapshot.info;
            let kind = match info.kind {
                Kind::Committed => "layer".to_owned(),
                kind => kind.to_string(),
            };
            text.push_str(&format!("  {kind} {}:\n    {found}\n", Quoted(&info.name)));
        }
        for (namespace, loss) in losses(left_out.iter().map(|found| &found.snapshot.info)) {
            text.push_str(&format!(
                "\n{} in containerd's namespace {namespace}:\n",
                self.by_task("to be done", "to be done afterwards")
            ));
            if !loss.layers.is_empty() {
                text.push_str("  remove the images that use these layers and pull them again");
                match loss.images.is_empty() {
                    true => text.push_str(&format!(
                        ";\n  `ctr -n {namespace} images check` shows which are not unpacked\n"
                    )),
                    false => text.push_str(", among them:\n"),
                }
                for image in &loss.images {
                    text.push_str(&format!("    image {}\n", Quoted(image)));
                }
            }
            if !loss.containers.is_empty() {
                text.push_str("  remove these containers and create them again:\n");
                for container in &loss.containers {
                    text.push_str(&format!("    snapshot {}\n", Quoted(container)));
                }
            }
        }
    }

    /// The paths of the directories of a snapshot that is left out.
    fn kept_at(&self, found: &LeftOut) -> Vec<String> {
        let top = |volume: &Volume| match volume {
            Volume::Image => &self.config.root,
            Volume::Writable => &self.config.writable,
        };
        let id = found.snapshot.id;
        let volumes = found.volumes.iter();
        volumes
            .map(|volume| format!("{}/left-out/{id}", top(volume)))
            .collect()
    }

    /// Lists what containers that are left out have written. Layers can be
    /// pulled again, but these files are nowhere else.
    fn tell_containers_data(&self, text: &mut String) {
        let left_out = self.plan.left_out.iter().filter(|found| {
            found.snapshot.info.kind == Kind::Active
                && belongs_to(&found.snapshot) == Volume::Writable
        });
        let lines = left_out.flat_map(|found| {
            let (name, is) = (
                Quoted(&found.snapshot.info.name),
                self.by_task("in", "would be in"),
            );
            let paths = self.kept_at(found).into_iter();
            paths.map(move |path| format!("{name}: {is} {path}/fs"))
        });
        let head = format!(
            "the only copies of what containers that {} left out have written; copy out what you \
             need:",
            self.by_task("are", "would be")
        );
        list(text, &head, lines);
    }

    /// The entries that are set aside and belong to no snapshot that is left
    /// out.
    fn strays(&self) -> impl Iterator<Item = &(Volume, SnapshotId)> {
        let named: HashSet<_> = self
            .plan
            .left_out
            .iter()
            .map(|found| found.snapshot.id)
            .collect();
        let aside = self.plan.aside.iter();
        aside.filter(move |(_, id)| !named.contains(id))
    }

    fn tell_strays(&self, text: &mut String) {
        let taken = self.by_task("taken", "would be taken");
        let strays = self.strays();
        list(
            text,
            &format!("directories of no snapshot, {taken} out of snapshots/:"),
            strays.map(|(volume, id)| format!("{volume} volume: snapshots/{id}")),
        );
        if !self.plan.aside.is_empty() {
            text.push_str(&format!(
                "\nthe directories of all these {} kept in {}/left-out and {}/left-out;\nno \
                 snapshot uses them: delete them once you have copied out what you need\n",
                self.by_task("are", "would be"),
                self.config.root,
                self.config.writable
            ));
        }
    }

    fn tell_others(&self, text: &mut String) {
        let left = self.by_task("left", "would be left");
        let lines = self.plan.others.iter().map(|(volume, name)| {
            let directory = format!("snapshots/{name}");
            format!("{volume} volume: {}", Quoted(&directory))
        });
        list(
            text,
            &format!("entries of no snapshot, {left} where they are:"),
            lines,
        );
    }

    fn json(&self) -> Value {
        json!({
            "dry_run": self.task == ImportTask::Look,
            "imported": {
                "layers": self.count(Kind::Committed),
                "active": self.count(Kind::Active),
                "views": self.count(Kind::View),
            },
            "away": self.away().map(|layer| &layer.info.name).collect::<Vec<_>>(),
            "shrunk": self.plan.shrunk.iter().map(|found| json!({
                "key": found.name,
                "recorded_bytes": found.recorded_bytes,
                "counted_bytes": found.counted_bytes,
            })).collect::<Vec<_>>(),
            "left_out": self.plan.left_out.iter().map(|found| self.left_out_json(found)).collect::<Vec<_>>(),
            "strays": self.strays().map(|(volume, id)| json!({
                "volume": volume.to_string(),
                "directory": format!("snapshots/{id}"),
            })).collect::<Vec<_>>(),
            "others": self.plan.others.iter().map(|(volume, name)| json!({
                "volume": volume.to_string(),
                "directory": format!("snapshots/{name}"),
            })).collect::<Vec<_>>(),
        })
    }

    fn left_out_json(&self, found: &LeftOut) -> Value {
        let info = &found.snapshot.info;
        json!({
            "key": info.name,
            "kind": info.kind.word(),
            "id": found.snapshot.id.number(),
            "code": found.why.code(),
            "text": found.to_string(),
            "image": image_of(info),
            "kept_on": found.volumes.iter().map(ToString::to_string).collect::<Vec<_>>(),
            "kept_at": self.kept_at(found),
        })
    }
}

/// Adds an indented list below a heading. Adds nothing if the list is empty.
fn list(text: &mut String, heading: &str, lines: impl Iterator<Item = String>) {
    for (number, line) in lines.enumerate() {
        if number == 0 {
            text.push_str(&format!("\n{heading}\n"));
        }
        text.push_str(&format!("  {line}\n"));
    }
}

/// Reports that an interrupted import was finished.
pub(super) fn print_finished(format: Format, config: &Config) {
    let sentences = || {
        format!(
            "an interrupted import had only its last step left, and is finished now; the \
             snapshots that\nit has left out, if any, are in {}/left-out and {}/left-out\n",
            config.root, config.writable
        )
    };
    show(format, sentences, || json!({"finished": true}));
}

/// Reports that an import was undone.
pub(super) fn print_undone(format: Format, database: &Path) {
    let database = database.display();
    let sentences =
        || format!("the import was undone: {database} is the Go original's database again\n");
    show(format, sentences, || json!({"undone": true}));
}
