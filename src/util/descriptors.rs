//! The limit of open files per process.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Raises the soft limit of open files to the hard limit. Service managers and shells
/// start programs with a soft limit of 1024, because select(2) cannot handle higher
/// descriptors. The daemon needs more: each connection is a descriptor, and a walk
/// through a tree takes up to about fifty.
pub fn raise_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    if let Err(errno) = setrlimit(Resource::Nofile, raised) {
        log::debug!("cannot raise this process's limit of open files: {errno}");
    }
}
