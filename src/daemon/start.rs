//! Starts the daemon: creates a snapshotter that can serve from a configuration.
//!
//! Owns: the order of the steps of a start, and how long a start waits for the writable volume.
//! The daemon serves even if that volume's disk does not answer: it refuses the requests that
//! need the volume, until the disk answers.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::config::Config;
use crate::error::{ErrorKind, Result};
use crate::quota::Support;
use crate::root::lock::{self, Lock};
use crate::root::open::require_mounted_root;
use crate::root::{state, writable};
use crate::snapshotter::Snapshotter;
use crate::store::{DATABASE, require_short};
use crate::types::{Limits, MountPath};
use crate::util::patience::Patience;
use crate::volume::{Image, Lifetime, Volumes, require_mount};

/// How long a start waits for the writable volume. Sleeping disks take seconds to spin up,
/// and programs that start containers at boot try only once. systemd permits a start to
/// take 90 seconds.
const PATIENCE: Duration = Duration::from_secs(20);

/// Takes the root's lock, opens the database and the volumes, and repairs what a crash has
/// left.
pub fn open(config: &Config) -> Result<(Lock, Arc<Snapshotter>)> {
    require_short(&Path::new(&config.state_dir).join(DATABASE))?;
    let mut patience = Patience::start("opener", PATIENCE)?;
    if config.requires_mounts {
        require_mounted_root(config)?;
        let path = config.writable.clone();
        let required = patience.wait_for(move || require_writable_mount(&path));
        required.unwrap_or(Ok(()))?;
    }
    let root = Image::open_root(&config.root, state::STATE)?;
    let lock = lock::require(&root)?;
    root.require_entry_types()?;
    let store = state::open(&root, config)?;
    let volumes = Volumes::new(Image::open(root)?, config.writable.clone());
    let options = config.options.for_this_kernel();
    let mount_options = options.overlay_options(false);
    writable::require_layers(&volumes, &store, &mount_options)?;
    volumes.withhold_writable(Some(patience.thread().id()));
    let snapshotter = Arc::new(Snapshotter::new(store, volumes, options));
    let opener = Arc::new(Opener {
        snapshotter: Arc::clone(&snapshotter),
        path: config.writable.clone(),
        requires_mount: config.requires_mounts,
        lifetime: config.writable_lifetime,
        mount_options,
        wants_limits: config.options.quota.default != Limits::NONE,
    });
    recover(&snapshotter, &opener, &mut patience)?;
    if patience.is_over() {
        log::warn!(
            "the writable volume {} has not answered for {} s: no container can be started until \
             its disk answers; requests that do not need this disk are served",
            config.writable,
            PATIENCE.as_secs()
        );
        patience.leave_to_thread(move || opener.open_late());
    } else {
        snapshotter.volumes().release_writable();
    }
    Ok((lock, snapshotter))
}

/// Repairs what a crash has left. The writable volume is only repaired if its disk answers.
fn recover(snapshotter: &Snapshotter, opener: &Arc<Opener>, patience: &mut Patience) -> Result<()> {
    let mut ask = |step: fn(&Opener) -> Result<()>| {
        let opener = Arc::clone(opener);
        patience.wait_for(move || step(&opener)).transpose()
    };
    ask(Opener::set_up)?;
    let mut begin = || {
        snapshotter.judge_image()?;
        if ask(Opener::judge)?.is_none() {
            snapshotter.recover_moves()?;
        }
        snapshotter.mend_image()?;
        ask(Opener::mend)?;
        snapshotter.store().begin_use()
    };
    match begin() {
        // Deleting the ballast makes room on the disk of the database, so that removals can
        // free more.
        Err(error)
            if error.kind() == ErrorKind::ResourceExhausted && snapshotter.store().make_room() =>
        {
            begin()
        }
        begun => begun,
    }
}

/// Takes the writable volume into use, in a thread that may have to wait for its disk.
struct Opener {
    snapshotter: Arc<Snapshotter>,
    path: MountPath,
    requires_mount: bool,
    lifetime: Lifetime,
    mount_options: Vec<String>,
    wants_limits: bool,
}

impl Opener {
    fn set_up(&self) -> Result<()> {
        if self.requires_mount {
            require_writable_mount(&self.path)?;
        }
        let (volumes, store) = (self.snapshotter.volumes(), self.snapshotter.store());
        writable::set_up(volumes, store, self.lifetime, &self.mount_options)
    }

    fn judge(&self) -> Result<()> {
        self.snapshotter.judge_writable()?;
        self.snapshotter.recover_moves()
    }

    fn mend(&self) -> Result<()> {
        self.snapshotter.mend_writable()?;
        self.log_quotas();
        Ok(())
    }

    /// Opens and repairs the writable volume after the start has stopped waiting for its disk.
    /// After an error, the daemon goes on without this volume.
    fn open_late(&self) {
        let opened = self
            .set_up()
            .and_then(|()| self.judge())
            .and_then(|()| self.mend());
        self.snapshotter.begin_with_writable(opened.is_ok());
        match opened {
            Ok(()) => log::info!(
                "the writable volume {} has answered: containers can be started",
                self.path
            ),
            Err(error) => log::error!(
                "the writable volume {} has answered, but cannot be used, so no container can be \
                 started; solve this problem and restart the daemon: {}",
                self.path,
                error.chain()
            ),
        }
    }

    /// Logs whether the writable volume supports project quotas, and warns if no container can
    /// be created without them.
    fn log_quotas(&self) {
        let wants_limits = self.wants_limits;
        match self.snapshotter.quota_support() {
            Ok(Support::Limits) => {
                log::info!("project quotas: the writable volume enforces limits")
            }
            Ok(Support::Counts) if !wants_limits => {
                log::info!("project quotas: the writable volume counts usage")
            }
            Ok(Support::Counts) => log::warn!(
                "no container can be created: --default-max-size and --default-max-inodes need \
                 project quotas that enforce limits, and the writable volume only counts usage \
                 (`doctor` says how to change that)"
            ),
            Err(error) if wants_limits => log::warn!(
                "no container can be created: --default-max-size and --default-max-inodes need \
                 project quotas: {}",
                error.chain()
            ),
            Err(error) => log::debug!("project quotas: {}", error.chain()),
        }
    }
}

fn require_writable_mount(path: &str) -> Result<()> {
    require_mount("--writable-dir", path)
}
