//! The daemon's life: lock, open, recover, bind, ready, wait, drain, close.
//!
//! Owns: the order of these steps, and everything that is done once. Never: the logic of a
//! request. After a kill at any moment, the next start finds every acknowledged change; see
//! `src/store` and `src/volume`.

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
use crate::store::Store;
use crate::util::descriptors;
use crate::util::threads::Background;
use server::Server;
use watch::Watch;

/// How long a stop waits for running requests and background threads. The whole stop takes less
/// than ten seconds.
const DRAIN: Duration = Duration::from_secs(9);

/// Serves until SIGTERM or SIGINT.
///
/// # Errors
///
/// The reason why the daemon cannot start, or why it has to stop: the root directory, the state
/// directory or the socket has disappeared.
pub fn run(config: &Config) -> Result<()> {
    let begun = Instant::now();
    // The signals are handled before any other thread starts: an unhandled signal would end the
    // process at once.
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP])
        .map_err(|error| Error::caused(ErrorKind::Internal, "handle signals", error))?;
    descriptors::raise_limit();
    // New files get the modes that this program gives them, whatever umask the daemon was
    // started with.
    umask(Mode::from_raw_mode(0o022));

    let (lock, snapshotter) = start::open(config)?;
    let service = Arc::new(Service::new(
        Arc::clone(&snapshotter),
        Pool::start(config.threads)?,
    ));
    let mut server = serve(config, &service)?;
    // These threads start after the socket exists, because creating it changes the umask of the
    // whole process for a moment.
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
        log::warn!(
            "requests are still running {DRAIN:?} after the stop began: the daemon ends without \
             answering them"
        );
    }
    server.stop(deadline);
    threads.extend(metrics_file);
    threads.extend([keeper, watch.into_thread()]);
    let have_ended = Background::end_all(threads, deadline);
    if let Some(error) = gone {
        // The destructors would write and remove files at paths that lead to other files now.
        std::mem::forget((lock, snapshotter));
        return Err(error);
    }
    let is_quiet = is_drained && have_ended;
    // Requests that were cut off may still use the database, which is then not closed: the next
    // start reads its log.
    if is_quiet {
        close_database(snapshotter.store(), deadline);
        drop(lock);
    } else {
        // Requests that were cut off run until the process ends. No other daemon may start
        // before.
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

/// Copies the database, if there is time for that until `deadline`, and closes it.
fn close_database(store: &Store, deadline: Instant) {
    if Instant::now() < deadline
        && let Err(error) = store.copy()
    {
        log::warn!("cannot {}; the earlier copy stays", error.chain());
    }
    if let Err(error) = store.close() {
        log::warn!(
            "cannot close the database, so the next start reads its log: {}",
            error.chain()
        );
    }
    // Closing the database has freed the space of its log, which the ballast may need.
    store.refill_ballast();
}

/// Whether the daemon stops on this signal. It ignores SIGHUP, because many daemons read their
/// settings again on SIGHUP, and nobody who sends it expects a stop.
fn is_stop(signal: i32) -> bool {
    if signal == SIGHUP {
        log::info!("SIGHUP is ignored: restart the daemon to make it read its settings again");
    }
    signal != SIGHUP
}

/// Reports the daemon's state to the service manager, if there is one.
fn notify(state: NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        log::warn!("cannot report the daemon's state to the service manager: {error}");
    }
}
