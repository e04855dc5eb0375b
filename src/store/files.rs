//! The names of the files that belong to a database.

use std::io;
use std::path::{Path, PathBuf};

use super::completeness::has_log;
use crate::error::{Context, Error, Result};

/// The name of every database, also of the database of the Go original.
pub const DATABASE: &str = "metadata.db";
/// The suffix of the log, without which a database may lack its latest transactions.
pub(super) const LOG: &str = "-wal";
/// The suffix of the copy of the database.
pub(super) const COPY: &str = ".copy";
/// The suffix of the copy while it is being made.
pub(super) const NEW_COPY: &str = ".copy.new";
/// The suffix of SQLite's journal, which a database without a log has, such as a copy.
pub(super) const JOURNAL: &str = "-journal";
/// The suffixes of the ballast files. There are two because a start needs two inodes.
pub(super) const BALLAST: [&str; 2] = [".ballast-1", ".ballast-2"];

/// The suffix of the database of the Go original after an import.
pub const ORIGINAL: &str = ".bbolt";
/// The suffix of the directory in which an import builds the new database.
pub const DRAFT: &str = ".import";

/// The suffixes of files that belong to one database, and must not be used with another.
const COMPANIONS: &[&str] = &[
    LOG,
    "-shm",
    JOURNAL,
    COPY,
    NEW_COPY,
    ".copy.new-journal",
    BALLAST[0],
    BALLAST[1],
];

/// The file beside a database that has its name and `suffix`.
pub(super) fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Whether a file of that name is a database or belongs to one.
pub fn is_database_file(name: &str) -> bool {
    name.strip_prefix(DATABASE).is_some_and(|suffix| {
        ["", ORIGINAL, DRAFT].contains(&suffix) || COMPANIONS.contains(&suffix)
    })
}

/// The longest path that SQLite accepts (`MAX_PATHNAME` in os_unix.c), after it has
/// followed links.
const MAX_PATH_BYTES: usize = 512;

/// Returns an error for a path that is too long for the database and the files beside
/// it.
pub fn require_short(path: &Path) -> Result<()> {
    let name = path.file_name().unwrap_or_default();
    let resolved = path.parent().and_then(|parent| parent.canonicalize().ok());
    let resolved = resolved.map_or(path.to_owned(), |parent| parent.join(name));
    let most = MAX_PATH_BYTES - NEW_COPY.len() - JOURNAL.len();
    match resolved.as_os_str().len() {
        bytes if bytes <= most => Ok(()),
        bytes => Err(Error::refused(format!(
            "the path of the database {} is {bytes} bytes long, at most {most} are allowed (a \
             limit of SQLite): give a shorter --state-dir",
            resolved.display()
        ))),
    }
}

/// Removes a file, if it is there.
pub(super) fn remove_file(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// The path of a log or a copy that may be all that is left of the lost database at
/// `path`; `None` if both are missing or empty.
pub fn find_remains(path: &Path) -> Result<Option<PathBuf>> {
    if has_log(path)? {
        return Ok(Some(beside(path, LOG)));
    }
    let copy = beside(path, COPY);
    match std::fs::symlink_metadata(&copy) {
        Ok(found) if found.is_file() && found.len() == 0 => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        found => {
            found.context(|| format!("look at {}", copy.display()))?;
            return Ok(Some(copy));
        }
    }
    Ok(None)
}

/// Removes the files that belong to the closed database at `path`, except the
/// database itself.
pub fn remove_companions(path: &Path) -> Result<()> {
    for companion in COMPANIONS.iter().map(|suffix| beside(path, suffix)) {
        remove_file(&companion).context(|| format!("remove {}", companion.display()))?;
    }
    Ok(())
}
