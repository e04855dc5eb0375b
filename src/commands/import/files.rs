//! The paths of the files that an import and its undoing rename, and functions for durable
//! renames.

use std::fs::{self, DirBuilder, File, Metadata};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::config::Config;
use crate::error::{Context, Error, Result};
use crate::store::{DATABASE, DRAFT, ORIGINAL, remove_companions};

/// The paths of the files that an import and its undoing rename.
pub(super) struct Paths {
    /// The original's database.
    pub(super) source: PathBuf,
    /// The second name of the original's database after an import.
    pub(super) kept: PathBuf,
    /// The new database.
    pub(super) target: PathBuf,
    /// The directory in which the new database is built, and in which it stays
    /// while an import is being undone. As long as the directory exists, an import
    /// or its undoing is not finished.
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

    /// The new database while it is a draft.
    pub(super) fn draft_database(&self) -> PathBuf {
        self.draft.join(DATABASE)
    }

    /// Whether the original's database and the new one have the same path, so that one rename
    /// decides which of them is in use.
    pub(super) fn is_one_place(&self) -> bool {
        self.source == self.target
    }

    /// Whether an import or its undoing was interrupted: then the draft's directory exists.
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

    /// Creates the draft's directory, durably.
    pub(super) fn make_draft(&self) -> Result<()> {
        for path in [&self.state, &self.draft] {
            let mut builder = DirBuilder::new();
            let made = builder.recursive(true).mode(0o700).create(path);
            made.context(|| format!("create {}", path.display()))?;
        }
        flush(&self.state)
    }

    /// Removes the files of the draft, and then its directory.
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

    /// Makes all renames durable.
    pub(super) fn flush(&self) -> Result<()> {
        flush(&self.root)?;
        flush(&self.state)
    }
}

/// Whether two paths lead to the same file.
pub(super) fn is_one_file(one: &Path, other: &Path) -> Result<bool> {
    let inode = |found: Metadata| (found.dev(), found.ino());
    let one = look(one)?.map(inode);
    Ok(one.is_some() && one == look(other)?.map(inode))
}

/// The metadata of a path, without following a link; `None` if it does not
/// exist.
pub(super) fn look(path: &Path) -> Result<Option<Metadata>> {
    if_there(fs::symlink_metadata(path)).context(|| format!("look at {}", path.display()))
}

pub(super) fn remove_file(path: &Path) -> Result<()> {
    if_there(fs::remove_file(path))
        .map(drop)
        .context(|| format!("remove {}", path.display()))
}

/// Renames a file in one step, even if the power fails. Replaces a file that has the name `to`.
pub(super) fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).context(|| format!("rename {} to {}", from.display(), to.display()))
}

/// Gives a file a second name, which must not exist.
pub(super) fn link(from: &Path, to: &Path) -> Result<()> {
    fs::hard_link(from, to)
        .context(|| format!("give {} the second name {}", from.display(), to.display()))
}

/// Makes the names in a directory durable. A directory that does not exist has no names, so its
/// absence is not an error.
pub(super) fn flush(directory: &Path) -> Result<()> {
    if_there(File::open(directory).and_then(|opened| opened.sync_all()))
        .map(drop)
        .context(|| format!("flush {}", directory.display()))
}

/// Converts the error "no such file" to `None`.
fn if_there<T>(done: io::Result<T>) -> io::Result<Option<T>> {
    match done {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        done => done.map(Some),
    }
}
