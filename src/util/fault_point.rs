//! Fault points: steps at which a test can kill the program, and flushes that a
//! test can leave out. Builds for users have none.

/// Whether this build has fault points.
pub const HAS_FAULT_POINTS: bool = cfg!(any(debug_assertions, feature = "fault-points"));

/// Ends the process with SIGKILL if `SNAPSHOTTER_FAULT` names this step.
pub fn fault_point(step: &str) {
    if HAS_FAULT_POINTS && std::env::var("SNAPSHOTTER_FAULT").is_ok_and(|at| at == step) {
        log::error!("killed at the fault point {step}");
        let _ =
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    }
}

/// Whether `SNAPSHOTTER_LEFT_OUT` names this flush, so that the caller must not flush. This
/// shows whether the tests notice a missing flush.
pub fn is_left_out(flush: &str) -> bool {
    HAS_FAULT_POINTS && std::env::var("SNAPSHOTTER_LEFT_OUT").is_ok_and(|name| name == flush)
}
