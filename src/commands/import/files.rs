//! The files that an import and its undoing move, and how a file is moved so that
//! it stays moved.

use std::fs::{self, DirBuilder, File, Metadata};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::config::Config;
use crate::error::{Context, Error, Result};
use crate::store::{DATABASE, DRAFT, ORIGINAL, remove_companions};

/// The files that are concerned.
pub(super) struct Paths {
    /// The original's database.
    pub(super) source: PathBuf,
    /// What it is called afterwards.
    pub(super) kept: PathBuf,
    /// Ours.
    pub(super) target: PathBuf,
    /// The directory in which ours is made, and in which it stays while an undoing
    /// goes on: as long as it is there, something is half done.
    pub(super) draft: PathBuf,
    root: PathBuf,
    state: PathBuf,
}

impl Paths {
    pub(super) fn new(config: &Config) -> Paths {
        let (root, state) = (
            PathBuf::from(&config.root),
            PathBuf::from(&config.state_dir),
        );
        Paths {
            source: root.join(DATABASE),
            kept: root.join(format!("{DATABASE}{ORIGINAL}")),
            target: state.join(DATABASE),
            draft: state.join(format!("{DATABASE}{DRAFT}")),
            root,
            state,
        }
    }

    /// Ours, as long as it is a draft.
    pub(super) fn draft_database(&self) -> PathBuf {
        self.draft.join(DATABASE)
    }

    /// Whether both databases have one place, so that one rename changes which of
    /// them is in use.
    pub(super) fn is_one_place(&self) -> bool {
        self.source == self.target
    }

    /// Whether an import, or an undoing, has been cut short.
    pub(super) fn has_draft(&self) -> Result<bool> {
        match look(&self.draft)? {
            None => Ok(false),
            Some(found) if found.is_dir() => Ok(true),
            Some(_) => Err(Error::refused(format!(
                "{} is not a directory: move it away",
                self.draft.display()
            ))),
        }
    }

    /// Makes the draft's directory, durably.
    pub(super) fn make_draft(&self) -> Result<()> {
        for path in [&self.state, &self.draft] {
            let mut builder = DirBuilder::new();
            let made = builder.recursive(true).mode(0o700).create(path);
            made.context(|| format!("create {}", path.display()))?;
        }
        flush(&self.state)
    }

    /// Removes the draft with what belongs to it, the directory last.
    pub(super) fn remove_draft(&self) -> Result<()> {
        remove_file(&self.draft_database())?;
        remove_companions(&self.draft_database())?;
        if_there(fs::remove_dir(&self.draft))
            .context(|| format!("remove {}", self.draft.display()))?;
        flush(&self.state)
    }

    /// Whether the original's database has its second name already.
    pub(super) fn is_source_kept(&self) -> Result<bool> {
        is_one_file(&self.kept, &self.source)
    }

    /// Makes every change of names last.
    pub(super) fn flush(&self) -> Result<()> {
        flush(&self.root)?;
        flush(&self.state)
    }
}

/// Whether two names are of one file.
pub(super) fn is_one_file(one: &Path, other: &Path) -> Result<bool> {
    let inode = |found: Metadata| (found.dev(), found.ino());
    let one = look(one)?.map(inode);
    Ok(one.is_some() && one == look(other)?.map(inode))
}

/// What has that name, no link followed; `None` if nothing has.
pub(super) fn look(path: &Path) -> Result<Option<Metadata>> {
    if_there(fs::symlink_metadata(path)).context(|| format!("look at {}", path.display()))
}

pub(super) fn remove_file(path: &Path) -> Result<()> {
    if_there(fs::remove_file(path))
        .map(drop)
        .context(|| format!("remove {}", path.display()))
}

/// Renames in one step, also if the power fails: what had the second name has lost it.
pub(super) fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).context(|| format!("rename {} to {}", from.display(), to.display()))
}

/// Gives a file a second name, which must be free.
pub(super) fn link(from: &Path, to: &Path) -> Result<()> {
    fs::hard_link(from, to)
        .context(|| format!("give {} the second name {}", from.display(), to.display()))
}

/// Makes the names in a directory durable. A directory that is not there, as a state
/// directory before the first import, has none.
pub(super) fn flush(directory: &Path) -> Result<()> {
    if_there(File::open(directory).and_then(|opened| opened.sync_all()))
        .map(drop)
        .context(|| format!("flush {}", directory.display()))
}

/// `None` if nothing of that name is there.
fn if_there<T>(done: io::Result<T>) -> io::Result<Option<T>> {
    match done {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        done => done.map(Some),
    }
}
