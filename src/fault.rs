//! Steps at which a test can have the program killed; not in release builds.

/// Ends the process with SIGKILL if `SNAPSHOTTER_FAULT` names this step.
pub fn fault_point(step: &str) {
    if cfg!(debug_assertions) && std::env::var("SNAPSHOTTER_FAULT").is_ok_and(|at| at == step) {
        log::error!("killed at the fault point {step}");
        let _ =
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    }
}
