//! The files that an import and its undoing move, and how a file is moved so that
//! it stays moved.

use std::fs::{self, DirBuilder, File, Metadata};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::config::Config;
use crate::error::{Error, ErrorKind, Result};
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
            made.map_err(|error| file_error(error, format!("create {}", path.display())))?;
        }
        flush(&self.state)
    }

    /// Removes the draft with what belongs to it, the directory last.
    pub(super) fn remove_draft(&self) -> Result<()> {
        remove_file(&self.draft_database())?;
        remove_companions(&self.draft_database())?;
        match fs::remove_dir(&self.draft) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            removed => {
                removed.map_err(|error| {
                    file_error(error, format!("remove {}", self.draft.display()))
                })?;
            }
        }
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
    match fs::symlink_metadata(path) {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(file_error(error, format!("look at {}", path.display()))),
    }
}

pub(super) fn remove_file(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        removed => removed.map_err(|error| file_error(error, format!("remove {}", path.display()))),
    }
}

/// One step, also for whoever looks after a power cut: what had the second name
/// has lost it.
pub(super) fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).map_err(|error| {
        let what = format!("rename {} to {}", from.display(), to.display());
        file_error(error, what)
    })
}

/// Gives a file a second name, which must be free.
pub(super) fn link(from: &Path, to: &Path) -> Result<()> {
    fs::hard_link(from, to).map_err(|error| {
        let what = format!("give {} the second name {}", from.display(), to.display());
        file_error(error, what)
    })
}

/// Makes changes of the names in a directory last. One that is not there, as a
/// state directory before the first import, has none.
pub(super) fn flush(directory: &Path) -> Result<()> {
    match File::open(directory).and_then(|opened| opened.sync_all()) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        flushed => {
            flushed.map_err(|error| file_error(error, format!("flush {}", directory.display())))
        }
    }
}

pub(super) fn file_error(error: std::io::Error, what: impl Into<String>) -> Error {
    let kind = match error.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
            ErrorKind::ResourceExhausted
        }
        _ => ErrorKind::Internal,
    };
    Error::caused(kind, what, error)
}
