//! Opens a root directory for a command, which may run beside the daemon or only while the
//! daemon is stopped.

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

/// If `--require-mount` was given, returns an error if the root directory or the writable
/// directory is not a mount point.
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

/// Returns an error if the root directory is not a mount point.
///
/// # Errors
///
/// [`ErrorKind::FailedPrecondition`](crate::error::ErrorKind::FailedPrecondition) naming the
/// directory.
pub fn require_mounted_root(config: &Config) -> Result<()> {
    require_mount("--root-dir", &config.root)
}

/// What a command opens a root for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// To read only. A daemon may be running.
    Look,
    /// To change something. If a daemon is running, the command asks the daemon to do it.
    ChangeOrAsk,
    /// To change something. No daemon may be running.
    Change,
}

/// An open root.
pub struct Visit {
    /// The lock of the root directory, so that no daemon can start. `None` if a daemon is
    /// running.
    pub lock: Option<Lock>,
    /// Whether the latest changes are missing from the database.
    pub completeness: Completeness,
    /// The database.
    pub store: Store,
    /// Both volumes. The writable volume is only used if it is the one that the database has
    /// recorded.
    pub volumes: Volumes,
}

/// Opens the root that the flags name, with its database.
///
/// # Errors
///
/// [`ErrorKind::FailedPrecondition`](crate::error::ErrorKind::FailedPrecondition) if no daemon
/// has ever served this root directory, or if a daemon is running and `purpose` does not permit
/// that.
pub fn visit(config: &Config, purpose: Purpose) -> Result<Visit> {
    let root = Image::open_existing_root(&config.root)?;
    // This check comes before the lock, because taking the lock creates a file, and nothing may
    // be created on a bare mount point.
    state::require_served(&root, config)?;
    if purpose != Purpose::Look {
        root.require_own()?;
    }
    let lock = match lock::acquire(&root)? {
        Acquired::Lock(lock) => Some(lock),
        Acquired::Held(_) if purpose != Purpose::Change => None,
        Acquired::Held(holder) => {
            return Err(Error::refused(format!(
                "the daemon that serves {} is running (process {holder}): stop the daemon first",
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

/// A hidden argument. The program starts itself again with it, followed by the path of the
/// writable volume: the child process only reads from that volume, and ends.
pub const ASK_CHILD: &str = "--ask-for-mark";

/// Whether the disk of the writable volume at `path` answers. A child process reads from the
/// disk, because a process with a thread that waits for a dead disk cannot end.
///
/// # Errors
///
/// [`ErrorKind::Internal`](crate::error::ErrorKind::Internal) if no child process can be
/// started.
pub fn answers(path: &MountPath) -> Result<bool> {
    let mut child = Command::new("/proc/self/exe")
        .args([ASK_CHILD, path])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context(|| format!("start a child process to ask whether {path} answers"))?;
    let deadline = Instant::now() + PATIENCE;
    while child
        .try_wait()
        .context(|| format!("wait for the child process that asks whether {path} answers"))?
        .is_none()
    {
        if Instant::now() >= deadline {
            // The child may end only when the disk answers, so nothing waits for its end.
            let _ = child.kill();
            return Ok(false);
        }
        thread::sleep(BETWEEN_LOOKS);
    }
    Ok(true)
}

/// The two identities that the database has recorded: its own, which is also in the file
/// `state` of the root directory, and the writable volume's, which is also in the file
/// `.volume` of that volume.
pub fn identities(store: &Store) -> Result<[Option<String>; 2]> {
    let reader = store.read()?;
    Ok([
        reader.fact(Identity::FACT)?,
        reader.fact(writable::IDENTITY)?,
    ])
}
