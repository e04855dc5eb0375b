//! The daemon's socket, and the gRPC server that listens on it.

use std::fs;
use std::future::Future;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context as TaskContext, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use grpcio::{ChannelBuilder, EnvBuilder, Environment, ServerBuilder, ServerCredentials, Service};
use rustix::fs::{Mode, statvfs};
use rustix::process::umask;

use crate::error::{Context, Error, ErrorKind, Result};
use crate::text::uri::encode_path;

/// A running gRPC server, and the socket on which it listens.
pub struct Server {
    server: grpcio::Server,
    /// The server's poll thread ends when this is dropped.
    _environment: Arc<Environment>,
    address: String,
    /// Device and inode of the socket, so that no other program's socket is
    /// removed.
    socket: (u64, u64),
}

/// How many requests gRPC receives at once. Further requests wait in their connections.
const REQUEST_SLOTS: usize = 128;

impl Server {
    /// Binds the socket (mode 0600) and serves. The caller holds the root's
    /// lock, so a socket on which no program answers was left by a dead daemon.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::FailedPrecondition`] if another program uses the address, or if the socket
    /// cannot be bound; [`ErrorKind::ResourceExhausted`] if the disk of the address is full.
    pub fn start(address: &str, service: Service) -> Result<Server> {
        clear_address(address)?;
        let environment = Arc::new(EnvBuilder::new().cq_count(1).name_prefix("grpc").build());
        let arguments = ChannelBuilder::new(Arc::clone(&environment))
            // For this probe, gRPC sends a ping with each request, to measure the network. On a
            // local socket, the ping costs more time than many requests.
            .http2_bdp_probe(false)
            .build_args();
        let mut server = ServerBuilder::new(Arc::clone(&environment))
            .channel_args(arguments)
            .requests_slot_per_cq(REQUEST_SLOTS)
            .register_service(service)
            .build()
            .map_err(|error| Error::caused(ErrorKind::Internal, "make a gRPC server", error))?;

        // Only root may use a snapshotter, so the socket never has a wider
        // mode, not even for a moment.
        let usual = umask(Mode::from_raw_mode(0o177));
        let uri = format!("unix:{}", encode_path(address.as_bytes()));
        let bound = server.add_listening_port(uri, ServerCredentials::insecure());
        umask(usual);
        bound.map_err(|error| {
            let (kind, why) = match has_room(address) {
                true => (ErrorKind::FailedPrecondition, ""),
                false => (ErrorKind::ResourceExhausted, ", on a disk that is full"),
            };
            Error::caused(kind, format!("listen on {address}{why}"), error)
        })?;
        let metadata =
            fs::symlink_metadata(address).context(|| format!("look at the socket {address}"))?;
        server.start();
        Ok(Server {
            server,
            _environment: environment,
            address: address.to_owned(),
            socket: (metadata.dev(), metadata.ino()),
        })
    }

    /// Closes the socket, lets answers under way reach their clients until
    /// `deadline`, and removes the socket.
    pub fn stop(&mut self, deadline: Instant) {
        let left = deadline.saturating_duration_since(Instant::now());
        // Even after the deadline, answers that are ready get a moment to be written.
        let left = left.max(Duration::from_millis(200));
        let shutdown = self.server.shutdown();
        if wait(shutdown, left).is_none() {
            log::warn!(
                "some clients have not received all of their answers yet: the daemon closes their \
                 connections"
            );
            self.server.cancel_all_calls();
        }
        // gRPC also removes the socket file, but at an unknown time.
        let is_ours = fs::symlink_metadata(&self.address)
            .is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == self.socket);
        if is_ours && let Err(error) = fs::remove_file(&self.address) {
            log::debug!("cannot remove the socket {}: {error}", self.address);
        }
    }
}

/// Makes room for the socket: removes a socket on which no program listens.
fn clear_address(address: &str) -> Result<()> {
    let refuse = |why| Err(Error::refused(format!("cannot listen on {address}: {why}")));
    if let Some(parent) = Path::new(address).parent() {
        fs::create_dir_all(parent).context(|| format!("create the directory of {address}"))?;
    }
    let found = match fs::symlink_metadata(address) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        found => found.context(|| format!("look at {address}"))?,
    };
    if !found.file_type().is_socket() {
        return refuse(
            "a file that is not a socket has that name: move it away, or give another --address",
        );
    }
    if UnixStream::connect(address).is_ok() {
        return refuse(
            "another program serves there: stop that program, or give another --address",
        );
    }
    fs::remove_file(address).context(|| format!("remove the stale socket {address}"))
}

/// Whether a socket can be created there. gRPC's error does not say it.
fn has_room(address: &str) -> bool {
    let parent = Path::new(address).parent().unwrap_or(Path::new("/"));
    // Some file systems have no fixed number of inodes, and report 0.
    statvfs(parent).is_ok_and(|disk| disk.f_bavail > 0 && (disk.f_favail > 0 || disk.f_files == 0))
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Waits for a future, for at most `limit`.
fn wait<F: Future>(future: F, limit: Duration) -> Option<F::Output> {
    let deadline = Instant::now() + limit;
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut context = TaskContext::from_waker(&waker);
    let mut future = pin!(future);
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut context) {
            return Some(output);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return None;
        }
        thread::park_timeout(left);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_ends_with_the_future_or_the_limit() {
        assert_eq!(wait(std::future::ready(7), Duration::ZERO), Some(7));
        let never = std::future::pending::<()>();
        assert_eq!(wait(never, Duration::from_millis(10)), None);
    }
}
