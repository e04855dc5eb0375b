//! Whether the paths that the daemon serves still lead to what it has open. Another file,
//! or none, means that the root or the state directory was emptied, or that a disk was
//! mounted over it: what would be acknowledged from then on would be lost.
//!
//! The kernel has in memory what is asked again and again: no disk is woken.

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

/// How often the paths are looked at.
const INTERVAL: Duration = Duration::from_secs(2);

/// A path, and what it led to at the start.
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

    /// Whether the path leads to nothing, or to another file. `false` if that cannot be
    /// found out.
    fn is_gone(&self) -> bool {
        let identity = |stat: Stat| (stat.st_dev, stat.st_ino);
        match (lstat(&self.path), fstat(&self.file)) {
            (Err(Errno::NOENT | Errno::NOTDIR), _) => true,
            (Ok(found), Ok(opened)) => identity(found) != identity(opened),
            _ => false,
        }
    }
}

/// The paths of a serving daemon.
pub struct Watch {
    gone: Arc<OnceLock<PathBuf>>,
    thread: Background,
}

impl Watch {
    /// Starts to look at them. `signals` is closed when one of them leads elsewhere.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Internal`](crate::error::ErrorKind::Internal) if one cannot be looked
    /// at now.
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

    /// Why the daemon cannot serve any longer, if so.
    pub fn finding(&self) -> Option<Error> {
        let path = self.gone.get()?.display();
        Some(Error::refused(format!(
            "{path} is not there any more, or is another file than the one that this daemon has \
             opened: its directory was emptied, or something is mounted over it; the daemon ends, \
             and leaves everything as it is"
        )))
    }

    /// The thread that looks.
    pub fn into_thread(self) -> Background {
        self.thread
    }
}
