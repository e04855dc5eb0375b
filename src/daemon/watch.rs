//! Watches whether the paths of the daemon's files still lead to the files that it has open. If
//! a path leads to another file, or to none, the root or the state directory was emptied, or a
//! disk was mounted over it. The daemon must stop then, because later changes would be lost.
//!
//! The kernel keeps these paths in memory, so the checks wake no disk.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use rustix::fd::OwnedFd;
use rustix::fs::{Mode, OFlags, Stat, fstat, lstat, open};
use rustix::io::Errno;
use signal_hook::iterator::Handle;

use crate::config::Config;
use crate::error::{Context, Error, Result};
use crate::store::DATABASE;
use crate::util::monitor::Monitor;
use crate::util::threads::Background;

/// The time between two checks of the paths.
const INTERVAL: Duration = Duration::from_secs(2);

/// A path, and the file to which it led at the start.
struct Watched {
    path: PathBuf,
    file: OwnedFd,
}

impl Watched {
    fn open(path: PathBuf) -> Result<Watched> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file =
            open(&path, flags, Mode::empty()).context(|| format!("look at {}", path.display()))?;
        Ok(Watched { path, file })
    }

    /// Whether the path leads to no file, or to another one. Returns `false` if the path
    /// cannot be resolved for another reason.
    fn is_gone(&self) -> bool {
        let identity = |stat: Stat| (stat.st_dev, stat.st_ino);
        match (lstat(&self.path), fstat(&self.file)) {
            (Err(Errno::NOENT | Errno::NOTDIR), _) => true,
            (Ok(found), Ok(opened)) => identity(found) != identity(opened),
            _ => false,
        }
    }
}

/// The thread that checks the paths of a serving daemon, and what it has found.
pub struct Watch {
    gone: Arc<OnceLock<PathBuf>>,
    thread: Background,
}

impl Watch {
    /// Starts to check the paths. Closes `signals` when a path leads to another file, or to
    /// none.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Internal`](crate::error::ErrorKind::Internal) if a path cannot be opened
    /// now.
    pub fn start(config: &Config, signals: Handle) -> Result<Watch> {
        let root = Path::new(&*config.root);
        let watched = [
            root.join("lock"),
            root.join("snapshots"),
            Path::new(&config.state_dir).join(DATABASE),
            PathBuf::from(&config.address),
        ];
        let watched: Vec<_> = watched
            .into_iter()
            .map(Watched::open)
            .collect::<Result<_>>()?;
        let gone = Arc::new(OnceLock::new());
        let found = Arc::clone(&gone);
        let stop = Arc::new(Monitor::<()>::default());
        let work = move |stop: &Monitor<()>| {
            while stop.pause(INTERVAL) {
                if let Some(watched) = watched.iter().find(|watched| watched.is_gone()) {
                    let _ = found.set(watched.path.clone());
                    return signals.close();
                }
            }
        };
        let thread = Background::start("watcher", &stop, Monitor::stop, work)?;
        Ok(Watch { gone, thread })
    }

    /// The reason why the daemon cannot serve any longer; `None` if it can.
    pub fn finding(&self) -> Option<Error> {
        let path = self.gone.get()?.display();
        Some(Error::refused(format!(
            "{path} is not there any more, or is another file than the one that this daemon has \
             opened: its directory was emptied, or something is mounted over it. The daemon \
             stops, and changes nothing there. Restore or unmount what is in the way, then start \
             the daemon"
        )))
    }

    /// The thread that checks the paths.
    pub fn into_thread(self) -> Background {
        self.thread
    }
}
