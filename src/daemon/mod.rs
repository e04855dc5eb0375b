//! The daemon's life: lock, open, recover, bind, ready, wait, drain, close.
//!
//! Owns: the order of these, and everything that is done once. Never: logic of
//! a request. Killed at any moment, the next start finds what was
//! acknowledged; see `src/store` and `src/volume`.

mod backup;
mod metrics_file;
mod server;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::Mode;
use rustix::process::umask;
use sd_notify::NotifyState;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::config::Config;
use crate::error::{Error, ErrorKind, Result};
use crate::quota::Support;
use crate::root::lock::{self, Lock};
use crate::root::open::require_mounts;
use crate::root::{state, writable};
use crate::service::{self, Pool, Service};
use crate::snapshotter::Snapshotter;
use crate::store::{DATABASE, require_short};
use crate::types::Limits;
use crate::util::descriptors;
use crate::volume::{Image, Volumes};
use server::Server;

/// How long a stop waits for requests under way; with what follows it takes
/// less than ten seconds, unless a disk takes longer for a flush under way or for
/// the old directory of a large layer.
const DRAIN: Duration = Duration::from_secs(9);

/// Serves until SIGTERM or SIGINT.
pub fn run(config: &Config) -> Result<()> {
    let begun = Instant::now();
    // Before any other thread is started, so that none is hit unprepared.
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP])
        .map_err(|error| Error::caused(ErrorKind::Internal, "handle signals", error))?;
    descriptors::raise_limit();
    // Files get the modes that are asked for, whatever umask the daemon was started with.
    umask(Mode::from_raw_mode(0o022));

    let (lock, snapshotter) = open(config)?;
    tell_quotas(&snapshotter, config);

    let snapshotter = Arc::new(snapshotter);
    let service = Arc::new(Service::new(
        Arc::clone(&snapshotter),
        Pool::start(config.threads)?,
    ));
    let mut server = Server::start(&config.address, service::build(&service))?;
    // After the socket was made, for which the process's umask changes.
    let threads = snapshotter.start_threads()?;
    let keeper = backup::start(&snapshotter)?;
    let metrics_file = metrics_file::start(&service, config.metrics_file.as_deref())?;
    log::info!(
        "serving on {} after {} ms: layers in {}, writes in {}",
        config.address,
        begun.elapsed().as_millis(),
        config.root,
        config.writable
    );
    notify(NotifyState::Ready);

    let signal = signals.forever().find(|&signal| is_stop(signal));
    log::info!("stopping on signal {}", signal.unwrap_or_default());
    notify(NotifyState::Stopping);
    let deadline = Instant::now() + DRAIN;
    snapshotter.begin_stop();
    let is_drained = service.pool.close(DRAIN);
    if !is_drained {
        log::warn!("requests are still running after {DRAIN:?}: they are cut off");
    }
    server.stop(deadline);
    drop(metrics_file);
    drop(threads);
    drop(keeper);
    // What is cut off may hold the database; the next start reads the log.
    if is_drained {
        let store = snapshotter.store();
        if Instant::now() < deadline
            && let Err(error) = store.copy()
        {
            log::warn!("{}", error.chain());
        }
        if let Err(error) = store.close() {
            log::warn!("{}", error.chain());
        }
        // With what the log has taken until now.
        store.refill_ballast();
    }
    if is_drained {
        drop(lock);
    } else {
        // Requests that were cut off run until the process ends; until then no other
        // daemon may start.
        std::mem::forget(lock);
    }
    log::info!("stopped; containers keep running");
    Ok(())
}

/// Takes the root's lock, opens the database and the volumes, and puts right what a crash
/// has left.
fn open(config: &Config) -> Result<(Lock, Snapshotter)> {
    require_short(&Path::new(&config.state_dir).join(DATABASE))?;
    require_mounts(config)?;
    let root = Image::open_root(&config.root, state::STATE)?;
    let lock = lock::require(&root)?;
    root.require_entry_types()?;
    let store = state::open(&root, config)?;
    let volumes = Volumes::new(Image::open(root)?, config.writable.clone());
    let options = config.options.for_this_kernel();
    let mount_options = options.overlay_options(false);
    writable::require_layers(&volumes, &store, &mount_options)?;
    writable::set_up(&volumes, &store, config.writable_lifetime, &mount_options)?;
    let snapshotter = Snapshotter::new(store, volumes, options);
    let begin = || {
        snapshotter.recover()?;
        snapshotter.store().begin_use()
    };
    match begin() {
        // With the space set aside, removals can make more.
        Err(error)
            if error.kind() == ErrorKind::ResourceExhausted && snapshotter.store().make_room() =>
        {
            begin()?;
        }
        begun => begun?,
    }
    Ok((lock, snapshotter))
}

/// Whether the daemon stops on this signal. SIGHUP asks other daemons to read their
/// settings, and would leave this host without one that serves.
fn is_stop(signal: i32) -> bool {
    if signal == SIGHUP {
        log::info!("SIGHUP is ignored: settings are read at a restart");
    }
    signal != SIGHUP
}

/// Logs at the start what containers will be refused for.
fn tell_quotas(snapshotter: &Snapshotter, config: &Config) {
    let wants_limits = config.options.quota.default != Limits::NONE;
    match snapshotter.quota_support() {
        Ok(Support::Limits) => log::info!("project quotas: limits are kept"),
        Ok(Support::Counts) if !wants_limits => log::info!("project quotas: usage is counted"),
        Ok(Support::Counts) => log::warn!(
            "no container can be made: --default-max-size and --default-max-inodes need limits, \
             and the writable volume only counts"
        ),
        Err(error) if wants_limits => log::warn!(
            "no container can be made: --default-max-size and --default-max-inodes need project \
             quotas: {}",
            error.chain()
        ),
        Err(error) => log::debug!("project quotas: {}", error.chain()),
    }
}

/// Tells the service manager, if there is one.
fn notify(state: NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        log::warn!("cannot notify the service manager: {error}");
    }
}
