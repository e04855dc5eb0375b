//! Opening a root for a command that works beside the daemon or in its place.

use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::lock::{self, Acquired, Lock};
use super::{state, writable};
use crate::config::Config;
use crate::error::{Context, Error, Result};
use crate::store::{Completeness, Store};
use crate::types::MountPath;
use crate::volume::{Identity, Image, Volumes, require_mount};

/// Refuses directories that are no mount points, if `--require-mount` was given.
///
/// # Errors
///
/// [`ErrorKind::FailedPrecondition`](crate::error::ErrorKind::FailedPrecondition) naming
/// the directory.
pub fn require_mounts(config: &Config) -> Result<()> {
    if !config.requires_mounts {
        return Ok(());
    }
    require_mounted_root(config)?;
    require_mount("--writable-dir", &config.writable)
}

/// Refuses a root directory that is not a mount point.
///
/// # Errors
///
/// As of [`require_mounts`].
pub fn require_mounted_root(config: &Config) -> Result<()> {
    require_mount("--root-dir", &config.root)
}

/// What a command opens a root for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// To look, also beside a running daemon.
    Look,
    /// To change something: while no daemon is running, or by asking the one that is.
    ChangeOrAsk,
    /// To change something while no daemon is running.
    Change,
}

/// An open root.
pub struct Visit {
    /// The lock of the root, so that no daemon starts meanwhile; `None` if one is
    /// running.
    pub lock: Option<Lock>,
    /// What is known of the database before it was opened.
    pub completeness: Completeness,
    /// The database.
    pub store: Store,
    /// Both volumes; the writable one as the database knows it.
    pub volumes: Volumes,
}

/// Opens the root that the flags name, with its database.
///
/// # Errors
///
/// [`ErrorKind::FailedPrecondition`](crate::error::ErrorKind::FailedPrecondition) if no
/// daemon has ever served there, or if one is running and in the way.
pub fn visit(config: &Config, purpose: Purpose) -> Result<Visit> {
    let root = Image::open_existing_root(&config.root)?;
    // Before the lock, which is a file: a bare mount point stays bare.
    state::require_served(&root, config)?;
    if purpose != Purpose::Look {
        root.require_own()?;
    }
    let lock = match lock::acquire(&root)? {
        Acquired::Lock(lock) => Some(lock),
        Acquired::Held(_) if purpose != Purpose::Change => None,
        Acquired::Held(holder) => {
            return Err(Error::refused(format!(
                "the daemon that serves {} is running (process {holder}): stop it first",
                config.root
            )));
        }
    };
    let open = match lock.is_some() && purpose != Purpose::Look {
        true => Store::open,
        false => Store::open_read_only,
    };
    let (store, completeness) = state::open_existing(&root, config, open)?;
    let volumes = Volumes::new(Image::open(root)?, config.writable.clone());
    if !answers(&config.writable)? {
        volumes.withhold_writable(None);
    }
    writable::expect_recorded(&volumes, &store)?;
    Ok(Visit {
        lock,
        completeness,
        store,
        volumes,
    })
}

/// How long a command waits for the writable volume. Sleeping disks take seconds to spin up.
const PATIENCE: Duration = Duration::from_secs(10);
const BETWEEN_LOOKS: Duration = Duration::from_millis(2);

/// The hidden argument, with a path after it, with which this program is started as the
/// child that asks whether the writable volume answers.
pub const ASK_CHILD: &str = "--ask-for-mark";

/// Whether what is at the path of a writable volume answers. A child asks: a process with a
/// thread that waits for a dead disk does not end.
///
/// # Errors
///
/// [`ErrorKind::Internal`](crate::error::ErrorKind::Internal) if the system gives no child.
pub fn answers(path: &MountPath) -> Result<bool> {
    let mut child = Command::new("/proc/self/exe")
        .args([ASK_CHILD, path])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context(|| "start a child process")?;
    let deadline = Instant::now() + PATIENCE;
    while child
        .try_wait()
        .context(|| "wait for a child process")?
        .is_none()
    {
        if Instant::now() >= deadline {
            // It ends at once, or when the disk answers.
            let _ = child.kill();
            return Ok(false);
        }
        thread::sleep(BETWEEN_LOOKS);
    }
    Ok(true)
}

/// The identities that the database has recorded: the root's, as in its file `state`,
/// and the writable volume's, as in its `.volume`.
pub fn identities(store: &Store) -> Result<[Option<String>; 2]> {
    let reader = store.read()?;
    Ok([
        reader.fact(Identity::FACT)?,
        reader.fact(writable::IDENTITY)?,
    ])
}
