//! The daemon's life: lock, open, recover, bind, ready, wait, drain, close.
//!
//! Owns: the order of these, and everything that is done once. Never: logic of
//! a request. Killed at any moment, the next start finds what was
//! acknowledged; see [`crate::store`] and [`crate::volume`].

mod backup;
mod metrics_file;
mod server;

use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::Mode;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit, umask};
use sd_notify::NotifyState;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::config::Config;
use crate::error::{Error, ErrorKind, Result};
use crate::host_dirs::Policy;
use crate::mount;
use crate::quota::Support;
use crate::root::{lock, state, writable};
use crate::service::{self, Desk, Metrics, Pool, Sending};
use crate::snapshotter::{Options, QuotaMode, QuotaOptions, Snapshotter};
use crate::types::Limits;
use crate::volume::{Image, MountPoints, Volumes, require_mount_points};
use server::Server;

/// How long a stop waits for requests under way; with what follows it takes
/// less than ten seconds, unless a disk takes longer for a flush under way or for
/// the old directory of a large layer.
const DRAIN: Duration = Duration::from_secs(9);

/// Serves until SIGTERM or SIGINT.
///
/// # Errors
///
/// Whatever keeps it from serving, as one line that says what to do.
pub fn run(config: &Config) -> Result<()> {
    let begun = Instant::now();
    // Before any other thread is started, so that none is hit unprepared.
    let mut signals = Signals::new([SIGTERM, SIGINT])
        .map_err(|error| Error::caused(ErrorKind::Internal, "handle signals", error))?;
    raise_descriptor_limit();
    // Modes are those that are asked for, whoever started this.
    umask(Mode::from_raw_mode(0o022));

    if config.mount_points == MountPoints::Required {
        require_mount_points(&[
            ("--root-dir", &config.root),
            ("--writable-dir", &config.writable),
        ])?;
    }
    let root = Image::open_root(&config.root)?;
    let lock = lock::require(&root)?;
    root.require_entry_types()?;
    let store = state::open(&root, config)?;
    let volumes = Volumes::new(Image::open(root)?, config.writable.clone());
    let options = options(config);
    writable::set_up(
        &volumes,
        &store,
        config.writable_lifetime,
        &options.mount_options,
    )?;
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

    tell_quotas(&snapshotter, config);

    let snapshotter = Arc::new(snapshotter);
    let desk = Arc::new(Desk {
        snapshotter: Arc::clone(&snapshotter),
        pool: Pool::start(config.threads)?,
        metrics: Metrics::default(),
        sending: Sending::default(),
    });
    let mut server = Server::start(&config.address, service::build(&desk))?;
    // After the socket was made, for which the process's umask changes.
    let threads = snapshotter.start_threads()?;
    let keeper = backup::start(&snapshotter)?;
    let metrics_file = metrics_file::start(&desk, config.metrics_file.as_deref())?;
    log::info!(
        "serving on {} after {} ms: layers in {}, writes in {}",
        config.address,
        begun.elapsed().as_millis(),
        config.root,
        config.writable
    );
    notify(NotifyState::Ready);

    let signal = signals.forever().next();
    log::info!("stopping on signal {}", signal.unwrap_or_default());
    notify(NotifyState::Stopping);
    let deadline = Instant::now() + DRAIN;
    snapshotter.begin_stop();
    let is_drained = desk.pool.close(DRAIN);
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
        // What is cut off works until the process has ended; so long, nobody
        // else may begin.
        std::mem::forget(lock);
    }
    log::info!("stopped; containers keep running");
    Ok(())
}

/// What containers will be refused for is told before the first one is.
fn tell_quotas(snapshotter: &Snapshotter, config: &Config) {
    let wants_limits = config.quota.default != Limits::NONE;
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

/// How the snapshotter is to behave on this machine.
pub(crate) fn options(config: &Config) -> Options {
    Options {
        mount_options: mount_options(config),
        removal: config.removal,
        sync: config.sync,
        relocation: config.relocation,
        reserve: config.reserve,
        upperdir_label: config.upperdir_label,
        quota: quota_options(config),
        lowers: Policy {
            allowed: config.allowed_lowers.clone(),
            kept_apart: vec![
                config.root.clone(),
                config.writable.clone(),
                config.state_dir.clone(),
            ],
        },
        lower_rules: config.lower_rules.clone(),
    }
}

/// In a user namespace the kernel lets nobody set a project (ioctl_fssetxattr), so
/// nothing is to be had for who does not insist.
fn quota_options(config: &Config) -> QuotaOptions {
    let mut options = config.quota;
    if options.mode == QuotaMode::Auto && mount::probe_user_namespace() {
        options.mode = QuotaMode::Off;
    }
    options
}

/// The configured options, with those that the kernel here makes necessary.
fn mount_options(config: &Config) -> Vec<String> {
    let mut options = Vec::new();
    let configured = |name: &str| {
        config
            .mount_options
            .iter()
            .any(|option| option.split('=').next() == Some(name))
    };
    if !configured("index") && mount::probe_parameter("index").is_some() {
        options.push("index=off".to_owned());
    }
    // With these, an upper directory holds parts of what is beneath it; the
    // host's directories change. Some kernels have them on by default.
    for name in ["metacopy", "redirect_dir"] {
        let is_on = || mount::probe_parameter(name).is_some_and(|value| value != "N");
        if !config.allowed_lowers.is_empty() && !configured(name) && is_on() {
            options.push(format!("{name}=off"));
        }
    }
    if !configured("userxattr") && mount::probe_user_namespace() {
        options.push("userxattr".to_owned());
    }
    options.extend_from_slice(&config.mount_options);
    options
}

/// As far as it goes: service managers and shells start with a soft limit of 1024
/// for the sake of programs that use select(2). Each connection is a descriptor,
/// and so is each level of a tree that is walked.
pub(crate) fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    if let Err(errno) = setrlimit(Resource::Nofile, raised) {
        log::debug!("cannot raise the limit of open files: {errno}");
    }
}

/// Tells the service manager, if there is one.
fn notify(state: NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        log::warn!("cannot notify the service manager: {error}");
    }
}
