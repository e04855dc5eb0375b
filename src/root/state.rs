//! Finds the database that belongs to a root directory, and creates a new one only if the root
//! holds no layers: with an empty database beside existing layers, all of them would be lost
//! for containerd.
//!
//! The file `<root>/state` records the path and the identity of the root's database. After a
//! crash during the first start, this file may be missing while the database exists. Without
//! the file, only a database that was never used is accepted.

use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode, OFlags, openat, unlinkat};
use rustix::io::{Errno, read};

use crate::config::Config;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::store::{
    Completeness, DATABASE, FileFormat, IN_USE, Store, peek_fact, probe_completeness, probe_format,
    require_short,
};
use crate::volume::{Identity, Image, Root, replace_file};

/// Opens the database of a root.
///
/// # Errors
///
/// [`ErrorKind::FailedPrecondition`] if the database is missing, or belongs to another program
/// or another root. The text says which disk or flag to check. [`ErrorKind::DataLoss`] if the
/// database is damaged, or if its latest changes are missing. The text says what to do.
pub fn open(root: &Root, config: &Config) -> Result<Store> {
    let path = Path::new(&config.state_dir).join(DATABASE);
    let in_root = Path::new(&config.root).join(DATABASE);
    let state = read_state(root, config)?;
    let format = require_ours(&path, state.as_ref())?;
    if in_root != path {
        require_ours(&in_root, None)?;
    }
    require_latest(&path)?;
    let opened = match (state, format) {
        (Some(state), FileFormat::Absent) => Err(missing(&state, &path)),
        (None, FileFormat::Absent) => create(root, config, &path),
        (Some(state), _) => open_known(root, config, &path, &state),
        (None, _) => adopt_untouched(root, config, &path),
    };
    let store = opened.map_err(|error| with_way_back(error, &path))?;
    // After an interrupted repair, a copy of an earlier state may have a log of its own.
    let copied = store.read()?.copied()?;
    match copied {
        Some(made) => Err(outdated(&path, &made)),
        None => Ok(store),
    }
}

/// Opens the existing database of a root directory, to inspect or repair it. A database whose
/// latest changes are missing is accepted.
///
/// # Errors
///
/// [`ErrorKind::FailedPrecondition`] if the root has no database, or if the database belongs to
/// another root. [`ErrorKind::DataLoss`] if the database is damaged. The text says what to do.
pub fn open_existing(
    root: &Root,
    config: &Config,
    open: fn(&Path) -> Result<Store>,
) -> Result<(Store, Completeness)> {
    let path = Path::new(&config.state_dir).join(DATABASE);
    require_short(&path)?;
    let state = read_state(root, config)?;
    let format = require_ours(&path, state.as_ref())?;
    let Some(state) = state else {
        return Err(never_served(config));
    };
    if format == FileFormat::Absent {
        return Err(with_way_back(missing(&state, &path), &path));
    }
    let completeness = probe_completeness(&path)?;
    if let Completeness::CopyWithLog(_) = completeness {
        require_latest(&path)?;
    }
    let store = open_own(root, &path, &state, open);
    let store = store.map_err(|error| with_way_back(error, &path))?;
    Ok((store, completeness))
}

/// Returns an error if no snapshotter has ever served this root directory.
pub fn require_served(root: &Root, config: &Config) -> Result<()> {
    match read_state(root, config)? {
        Some(_) => Ok(()),
        None => Err(never_served(config)),
    }
}

fn never_served(config: &Config) -> Error {
    Error::refused(format!(
        "the directory {} has no file \"state\", so no snapshotter has ever served it: mount its \
         disk, or give the --root-dir that the daemon has",
        config.root
    ))
}

/// Adds to the error about a damaged database what the user can do.
fn with_way_back(error: Error, path: &Path) -> Error {
    if error.kind() != ErrorKind::DataLoss {
        return error;
    }
    let shown = path.display();
    let way_back = match Path::new(&format!("{shown}.copy")).exists() {
        true => format!(
            "to go on with the earlier state in {shown}.copy, move {shown} and {shown}-wal away, \
             copy {shown}.copy to {shown}, and run `check --repair`"
        ),
        false => "restore the database from a backup and run `check --repair`".to_owned(),
    };
    error.while_doing(format!("the database {shown} cannot be used; {way_back}"))
}

/// Returns an error if acknowledged changes are missing from the database at `path`. With such
/// a database, the daemon would deny that the snapshots of these changes exist, and would treat
/// their directories as strays.
fn require_latest(path: &Path) -> Result<()> {
    let shown = path.display();
    let why = match probe_completeness(path)? {
        Completeness::Whole => return Ok(()),
        Completeness::LogMissing => format!(
            "the database {shown} was in use, and its log {shown}-wal, with the latest changes, \
             is missing or empty: put the log back, or, if the log is lost, run `check --repair`, \
             which goes on without these changes"
        ),
        Completeness::Copy(made) => return Err(outdated(path, &made)),
        Completeness::CopyWithLog(made) => format!(
            "the database {shown} is a copy of an earlier state, made {made}, and {shown}-wal is \
             not its log: move {shown}-wal away, then run `check --repair`"
        ),
    };
    Err(Error::data_loss(why))
}

fn outdated(path: &Path, made: &str) -> Error {
    Error::data_loss(format!(
        "the database {} is a copy of an earlier state, made {made}: run `check --repair` first, \
         which sets aside the directories that this copy does not know",
        path.display()
    ))
}

/// Returns an error if the file at `path` is not a database of this program. If `state` names
/// this path, the file was the root's database once, and is damaged now.
fn require_ours(path: &Path, state: Option<&State>) -> Result<FileFormat> {
    let shown = path.display();
    let why = match probe_format(path)? {
        format @ (FileFormat::Absent | FileFormat::Ours) => return Ok(format),
        FileFormat::Bolt => {
            "is the database of a Go snapshotter (bbolt): take over its snapshots with the \
             command `import`, or give another --root-dir"
        }
        _ if state.is_some_and(|state| state.database == path) => {
            let error = Error::data_loss("the first bytes of the file are damaged");
            return Err(with_way_back(error, path));
        }
        FileFormat::OtherSqlite => "is the database of another program: give another --root-dir",
        FileFormat::Unknown => "is not a database of this program: give another --root-dir",
    };
    Err(Error::refused(format!("{shown} {why}")))
}

fn missing(state: &State, path: &Path) -> Error {
    let shown = path.display();
    if state.database == path && path.exists() {
        return Error::data_loss("the file is empty");
    }
    if state.database == path {
        return Error::refused(format!(
            "the database {shown} is missing, but it was there before: mount the disk of the \
             database (identity {}), or restore the database from a backup",
            state.identity
        ));
    }
    let was = state.database.display();
    Error::refused(format!(
        "there is no database {shown}: the database of this root is {was}; give the directory of \
         {was} as --state-dir, or move {was} (and {was}-wal, if it exists) to {shown}"
    ))
}

fn create(root: &Root, config: &Config, path: &Path) -> Result<Store> {
    require_no_snapshots(root, config, path)?;
    std::fs::create_dir_all(&config.state_dir)
        .context(|| format!("create the state directory {}", config.state_dir))?;
    let store = Store::open(path)?;
    record(root, config, path, &store)?;
    Ok(store)
}

fn require_no_snapshots(root: &Root, config: &Config, path: &Path) -> Result<()> {
    if Image::holds_snapshots(root)? {
        return Err(Error::refused(format!(
            "{}/snapshots holds layers, but their database {} is not there: mount the disk of the \
             database, give the right --state-dir, or restore the database from a backup",
            config.root,
            path.display()
        )));
    }
    Ok(())
}

fn adopt_untouched(root: &Root, config: &Config, path: &Path) -> Result<Store> {
    let of_another = || {
        Error::refused(format!(
            "the database {} has been in use, but {} has no file \"state\": mount the image \
             disk there, or give the --root-dir that belongs to this database",
            path.display(),
            config.root
        ))
    };
    // Another root's daemon may be using this database now.
    if peek_fact(path, IN_USE).is_some() {
        return Err(of_another());
    }
    let store = Store::open(path)?;
    if !store.read()?.is_untouched()? {
        return Err(of_another());
    }
    require_no_snapshots(root, config, path)?;
    record(root, config, path, &store)?;
    Ok(store)
}

/// Gives the database an identity, and records in the root that the database with
/// this identity is, or will be, at `path`.
pub(crate) fn record(root: &Root, config: &Config, path: &Path, store: &Store) -> Result<()> {
    let mut transaction = store.write()?;
    let identity = match transaction.fact(Identity::FACT)? {
        Some(text) => Identity::parse(&text).ok_or_else(|| {
            Error::data_loss(format!("the database is damaged: its identity is {text:?}"))
        })?,
        None => Identity::random()?,
    };
    transaction.record_fact(Identity::FACT, &identity.to_string())?;
    transaction.commit()?;
    let state = State {
        database: path.to_owned(),
        identity,
    };
    write_state(root, config, &state)
}

/// Deletes the record that the root has a database.
pub(crate) fn forget(root: &Root) -> Result<()> {
    match unlinkat(root.fd(), STATE, AtFlags::empty()) {
        Err(Errno::NOENT) => Ok(()),
        removed => removed.context(|| format!("remove {}/{STATE}", root.path())),
    }
}

/// The path of the root's database, if the root has one.
///
/// # Errors
///
/// [`ErrorKind::FailedPrecondition`] if the file `state` is damaged.
pub(crate) fn recorded(root: &Root, config: &Config) -> Result<Option<PathBuf>> {
    read_state(root, config).map(|state| state.map(|state| state.database))
}

/// Whether the database at `path` belongs to the root and was closed properly. Reads only the
/// database file, and not its log.
pub(crate) fn is_at_rest(root: &Root, config: &Config, path: &Path) -> Result<bool> {
    let state = read_state(root, config)?;
    let is_known = state.is_some_and(|state| {
        state.database == path
            && peek_fact(path, Identity::FACT) == Some(state.identity.to_string())
    });
    Ok(is_known && peek_fact(path, IN_USE).is_none())
}

fn open_known(root: &Root, config: &Config, path: &Path, state: &State) -> Result<Store> {
    let store = open_own(root, path, state, Store::open)?;
    if state.database != path {
        log::info!(
            "the database has moved from {} to {}",
            state.database.display(),
            path.display()
        );
        let moved = State {
            database: path.to_owned(),
            identity: state.identity.clone(),
        };
        write_state(root, config, &moved)?;
    }
    Ok(store)
}

/// Opens the database at `path`. Returns an error if the database belongs to another root.
fn open_own(
    root: &Root,
    path: &Path,
    state: &State,
    open: fn(&Path) -> Result<Store>,
) -> Result<Store> {
    let refuse_other = |found: Option<String>| {
        if found == Some(state.identity.to_string()) {
            return Ok(());
        }
        Err(Error::refused(format!(
            "the database {} (identity {}) belongs to another root than {}, whose database has \
             the identity {}: give the --state-dir that goes with this --root-dir",
            path.display(),
            found.as_deref().unwrap_or("unknown"),
            root.path(),
            state.identity
        )))
    };
    // Another root's daemon may be using the file, and opening changes it, so the identity is
    // read before. If the identity cannot be read, the file is damaged, or the identity is
    // still in the log.
    if let found @ Some(_) = peek_fact(path, Identity::FACT) {
        refuse_other(found)?;
    }
    let store = open(path)?;
    refuse_other(store.read()?.fact(Identity::FACT)?)?;
    Ok(store)
}

/// The contents of `<root>/state`.
struct State {
    database: PathBuf,
    identity: Identity,
}

/// The file in the root that records the root's database.
pub const STATE: &str = "state";
const MAX_STATE_BYTES: usize = 8192;

fn read_state(root: &Root, config: &Config) -> Result<Option<State>> {
    let reading = || format!("read {}/{STATE}", config.root);
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = match openat(root.fd(), STATE, flags, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(None),
        file => file.context(reading)?,
    };
    let mut bytes = vec![0; MAX_STATE_BYTES];
    let length = read(&file, bytes.as_mut_slice()).context(reading)?;
    let text = String::from_utf8_lossy(&bytes[..length]);
    parse_state(&text).map(Some).ok_or_else(|| {
        Error::refused(format!(
            "{}/{STATE} is damaged: it has to have a line \"database <path>\" and a line \
             \"identity <32 hexadecimal digits>\"",
            config.root
        ))
    })
}

fn parse_state(text: &str) -> Option<State> {
    let field = |name: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))
    };
    Some(State {
        database: PathBuf::from(field("database")?),
        identity: Identity::parse(field("identity")?)?,
    })
}

fn write_state(root: &Root, config: &Config, state: &State) -> Result<()> {
    let text = format!(
        "database {}\nidentity {}\n",
        state.database.display(),
        state.identity
    );
    replace_file(root.fd(), STATE, &text).context(|| format!("write {}/{STATE}", config.root))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_is_read_as_it_is_written() {
        let identity = Identity::random().unwrap();
        let text = format!("database /with blank/metadata.db\nidentity {identity}\n");
        let state = parse_state(&text).unwrap();
        assert_eq!(state.database, Path::new("/with blank/metadata.db"));
        assert_eq!(state.identity, identity);
        for damaged in ["", "database /x\n", "database /x\nidentity short\n"] {
            assert!(parse_state(damaged).is_none(), "{damaged:?}");
        }
    }
}
