//! The root of the Go original: its database, written by containerd's own
//! package, and the directories that it makes.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::program;
use crate::support::daemon::{BINARY, Daemon, Split, command};
use crate::support::disk::Disk;
use crate::support::{Tree, tree};

/// Two disks that the original has used.
pub struct Original {
    pub image: Disk,
    pub writable: Disk,
    pub flags: Vec<String>,
    /// A writable directory that is used instead of its own.
    pub other_writable: Option<PathBuf>,
    steps: Vec<Value>,
    last_id: u64,
}

/// The result of an import: exit code, standard output, standard error.
pub type Said = (i32, String, String);

impl Original {
    pub fn new() -> Original {
        let original = Original {
            image: Disk::ext4(256),
            writable: Disk::ext4(256),
            flags: Vec::new(),
            other_writable: None,
            steps: Vec::new(),
            last_id: 0,
        };
        for top in [original.root(), original.writable()] {
            fs::create_dir_all(top.join("snapshots")).unwrap();
        }
        original
    }

    /// The disks of a daemon after its end.
    pub fn again(split: Split) -> Original {
        let Split {
            image,
            writable,
            daemon,
        } = split;
        drop(daemon);
        Original {
            image,
            writable,
            flags: Vec::new(),
            other_writable: None,
            steps: Vec::new(),
            last_id: 0,
        }
    }

    pub fn root(&self) -> PathBuf {
        self.image.path().join("root")
    }

    pub fn writable(&self) -> PathBuf {
        self.writable.path().join("writable")
    }

    pub fn database(&self) -> PathBuf {
        self.root().join("metadata.db")
    }

    /// `fs` of the newest snapshot, on the image volume.
    pub fn last_on_image(&self) -> PathBuf {
        self.root().join(format!("snapshots/{}/fs", self.last_id))
    }

    /// `fs` of the newest snapshot, on the writable volume.
    pub fn last_on_writable(&self) -> PathBuf {
        self.writable()
            .join(format!("snapshots/{}/fs", self.last_id))
    }

    fn make(&mut self, top: &Path, step: Value) {
        self.last_id += 1;
        for part in ["fs", "work"] {
            fs::create_dir_all(top.join(format!("snapshots/{}/{part}", self.last_id))).unwrap();
        }
        self.steps.push(step);
    }

    fn commit(&mut self, key: &str, name: &str, upper: &Path) {
        let (size, inodes) = usage(upper);
        let labels = json!({"containerd.io/snapshot.ref": name});
        self.steps
            .push(program::commit(key, name, size, inodes, labels));
    }

    /// Adds an unpacked layer, with a file of that content.
    pub fn layer(&mut self, name: &str, parent: &str, content: &str) {
        let key = format!("default/{}/extract-1 {name}", self.last_id);
        let step = program::prepare(&key, parent, json!({"containerd.io/snapshot.ref": name}));
        self.make(&self.root(), step);
        let upper = self.last_on_image();
        fs::write(upper.join(name.rsplit('/').next().unwrap()), content).unwrap();
        fs::write(upper.join("top"), content).unwrap();
        self.commit(&key, name, &upper);
    }

    /// Adds a container's snapshot, with a file of that content.
    pub fn container(&mut self, key: &str, parent: &str, content: &str) {
        let step = program::prepare(
            key,
            parent,
            json!({"owner": "me", "long": "l".repeat(2000)}),
        );
        self.make(&self.writable(), step);
        fs::write(self.last_on_writable().join("own"), content).unwrap();
    }

    /// Adds a layer that was committed from a container's snapshot. The
    /// original cannot use it, because it looks for it on the image volume.
    pub fn broken(&mut self, name: &str, parent: &str, content: &str) {
        self.container("default/0/init", parent, content);
        let upper = self.last_on_writable();
        self.commit("default/0/init", name, &upper);
    }

    /// Adds a view, with the directory that the original makes for it.
    pub fn view(&mut self, key: &str, parent: &str) {
        self.make(&self.writable(), program::view(key, parent));
        fs::remove_dir(self.last_on_writable().with_file_name("work")).unwrap();
    }

    /// Uses up an id, without a snapshot.
    pub fn removed(&mut self) {
        self.last_id += 1;
        let key = format!("gone-{}", self.last_id);
        self.steps.push(program::prepare(&key, "", json!({})));
        self.steps.push(program::remove(&key));
    }

    /// Writes the database, and returns what containerd's package finds in it.
    pub fn finish(&mut self) -> Value {
        let steps = std::mem::take(&mut self.steps);
        program::write(&self.database(), &steps, &["-per-transaction", "50"])
    }

    pub fn arguments(&self) -> Vec<String> {
        let flags: Vec<&str> = self.flags.iter().map(String::as_str).collect();
        let mut arguments = command(&self.image, &self.writable, &flags);
        if let Some(other) = &self.other_writable {
            let own = self.writable();
            for argument in &mut arguments {
                if Path::new(argument) == own {
                    *argument = other.to_str().unwrap().to_owned();
                }
            }
        }
        arguments
    }

    pub fn import(&self, flags: &[&str]) -> Said {
        self.import_dying_at(flags, None)
    }

    /// Runs an import that is killed at a step.
    pub fn import_dying_at(&self, flags: &[&str], step: Option<&str>) -> Said {
        let output = Command::new(BINARY)
            .arg("import")
            .args(self.arguments())
            .args(flags)
            .envs(step.map(|step| ("SNAPSHOTTER_FAULT", step)))
            .stdin(Stdio::null())
            .output()
            .unwrap();
        (
            output.status.code().unwrap_or(-1),
            String::from_utf8(output.stdout).unwrap(),
            String::from_utf8(output.stderr).unwrap(),
        )
    }

    /// Imports everything, and fails unless that works.
    #[track_caller]
    pub fn import_all(&self) -> String {
        let (code, said, complaint) = self.import(&[]);
        assert_eq!(code, 0, "{said}{complaint}");
        said
    }

    /// Undoes the import, and fails unless that works.
    #[track_caller]
    pub fn undo(&self) {
        let (code, said, complaint) = self.import(&["--undo"]);
        assert_eq!(code, 0, "{said}{complaint}");
    }

    /// Fails unless the import is refused with these words, and both volumes
    /// are as they were.
    #[track_caller]
    pub fn is_refused(&self, flags: &[&str], words: &[&str]) {
        let before = self.trees();
        let (code, said, complaint) = self.import(flags);
        assert_eq!(code, 2, "{said}{complaint}");
        for word in words {
            assert!(complaint.contains(word), "{word:?} is not in {complaint:?}");
        }
        assert_eq!(complaint.lines().count(), 1, "{complaint}");
        self.is_as(&before);
    }

    /// Both volumes as they are now.
    pub fn trees(&self) -> [Tree; 2] {
        [self.root(), self.writable()].map(tree)
    }

    /// Fails unless both volumes are as they were, except for what overlayfs
    /// leaves in each mounted `work`, and for the log of an unfinished database.
    #[track_caller]
    pub fn is_as(&self, before: &[Tree; 2]) {
        for (now, before) in self.trees().into_iter().zip(before) {
            let is_compared = |path: &Path| {
                let draft = path
                    .parent()
                    .filter(|above| above.ends_with("metadata.db.import"));
                let is_draft = draft
                    .is_some_and(|draft| now.contains_key(draft) && before.contains_key(draft));
                !is_draft && !path.ends_with("work/work")
            };
            let paths = now.keys().chain(before.keys());
            let changed: Vec<_> = paths
                .filter(|path| is_compared(path) && now.get(*path) != before.get(*path))
                .collect();
            assert!(changed.is_empty(), "changed: {changed:?}");
        }
    }

    /// Starts the daemon on what was imported.
    pub fn serve(self) -> Split {
        let daemon = Daemon::start(&self.arguments());
        Split {
            image: self.image,
            writable: self.writable,
            daemon,
        }
    }
}

/// Allocated bytes and inodes, as the original counts them at a commit.
fn usage(top: &Path) -> (u64, u64) {
    let mut found = (0, 0);
    for path in tree(top).keys() {
        let metadata = fs::symlink_metadata(path).unwrap();
        found.0 += metadata.blocks() * 512;
        found.1 += 1;
    }
    found
}
