//! The daemon's life: lock, open, recover, bind, ready, wait, drain, close.
//!
//! Owns: the order of these, and everything that is done once. Never: logic of
//! a request. Killed at any moment, the next start finds what was
//! acknowledged; see `src/store` and `src/volume`.

mod backup;
mod metrics_file;
mod server;
mod start;
mod watch;

use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::Mode;
use rustix::process::umask;
use sd_notify::NotifyState;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::config::Config;
use crate::error::{Error, ErrorKind, Result};
use crate::service::{self, Pool, Service};
use crate::util::descriptors;
use crate::util::threads::Background;
use server::Server;
use watch::Watch;

/// How long a stop waits for requests under way, and for the threads beside them; with what
/// follows it takes less than ten seconds.
const DRAIN: Duration = Duration::from_secs(9);

/// Serves until SIGTERM or SIGINT.
///
/// # Errors
///
/// Why the daemon cannot start; also if later the root, the state directory or the socket is
/// not there any more.
pub fn run(config: &Config) -> Result<()> {
    let begun = Instant::now();
    // Before any other thread is started, so that none is hit unprepared.
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP])
        .map_err(|error| Error::caused(ErrorKind::Internal, "handle signals", error))?;
    descriptors::raise_limit();
    // Files get the modes that are asked for, whatever umask the daemon was started with.
    umask(Mode::from_raw_mode(0o022));

    let (lock, snapshotter) = start::open(config)?;
    let service = Arc::new(Service::new(
        Arc::clone(&snapshotter),
        Pool::start(config.threads)?,
    ));
    let mut server = serve(config, &service)?;
    // After the socket was made, for which the process's umask changes.
    let mut threads = snapshotter.start_threads()?;
    let keeper = backup::start(&snapshotter)?;
    let metrics_file = metrics_file::start(&service, config.metrics_file.as_deref())?;
    let watch = Watch::start(config, signals.handle())?;
    log::info!(
        "serving on {} after {} ms: layers in {}, writes in {}",
        config.address,
        begun.elapsed().as_millis(),
        config.root,
        config.writable
    );
    notify(NotifyState::Ready);

    let signal = signals.forever().find(|&signal| is_stop(signal));
    let gone = watch.finding();
    if gone.is_none() {
        log::info!("stopping on signal {}", signal.unwrap_or_default());
    }
    notify(NotifyState::Stopping);
    let deadline = Instant::now() + DRAIN;
    snapshotter.begin_stop();
    let is_drained = service.pool.close(DRAIN);
    if !is_drained {
        log::warn!("requests are still running after {DRAIN:?}: they are cut off");
    }
    server.stop(deadline);
    threads.extend(metrics_file);
    threads.extend([keeper, watch.into_thread()]);
    let have_ended = Background::end_all(threads, deadline);
    if let Some(error) = gone {
        // Nothing is written or removed at paths that lead elsewhere.
        std::mem::forget((lock, snapshotter));
        return Err(error);
    }
    let is_quiet = is_drained && have_ended;
    // What is cut off may hold the database; the next start reads the log.
    if is_quiet {
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
    if is_quiet {
        drop(lock);
    } else {
        // What was cut off runs until the process ends; until then no other
        // daemon may start.
        std::mem::forget(lock);
    }
    log::info!("stopped; containers keep running");
    Ok(())
}

/// Binds the socket. On a disk without room for it, the space that was set aside makes some,
/// so that snapshots can be removed.
fn serve(config: &Config, service: &Arc<Service>) -> Result<Server> {
    let serve = || Server::start(&config.address, service::build(service));
    match serve() {
        Err(error)
            if error.kind() == ErrorKind::ResourceExhausted
                && service.snapshotter.store().make_room() =>
        {
            serve()
        }
        served => served,
    }
}

/// Whether the daemon stops on this signal. SIGHUP asks other daemons to read their
/// settings, and would leave this host without one that serves.
fn is_stop(signal: i32) -> bool {
    if signal == SIGHUP {
        log::info!("SIGHUP is ignored: settings are read at a restart");
    }
    signal != SIGHUP
}

/// Tells the service manager, if there is one.
fn notify(state: NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        log::warn!("cannot notify the service manager: {error}");
    }
}
