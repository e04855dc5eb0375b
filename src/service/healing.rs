//! How `check --heal` works while the daemon runs: the command unpacks and compares, and
//! the daemon, which has the claims and locks for that, replaces the layer.
//!
//! Owns: both ends of that call, and the check that they are of the same
//! version and root.

use std::sync::Arc;
use std::time::Duration;

use grpcio::{CallOption, ChannelBuilder, Client, EnvBuilder, MethodType, RpcStatusCode};

use super::method::Method;
use super::{decode, encode};
use crate::error::{Error, ErrorKind, Result};
use crate::proto::healing::{Checked, HealRequest, HealResponse};
use crate::snapshotter::Snapshotter;
use crate::store::Store;
use crate::text::uri::encode_path;
use crate::types::{Quoted, SnapshotId};
use crate::volume::Identity;

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// How long the daemon may take to flush the image volume and to replace a layer.
const PATIENCE: Duration = Duration::from_secs(600);

/// Answers a request of a command.
pub(super) fn heal(snapshotter: &Snapshotter, request: HealRequest) -> Result<HealResponse> {
    if request.version != VERSION {
        return Err(Error::refused(format!(
            "this command has version {0}, the daemon has version {VERSION}: restart the daemon \
             to run {0}, or use the command of version {VERSION}",
            Quoted(&request.version)
        )));
    }
    if request.root != root_of(snapshotter.store())? {
        return Err(Error::refused(
            "the daemon serves another root than the one that the command checks",
        ));
    }
    if let Some(checked) = request.checked.into_option() {
        snapshotter.record_deep_check(checked.compared, checked.damaged)?;
    }
    let mut response = HealResponse::new();
    let id = SnapshotId::new(request.id);
    match (request.layer.as_str(), request.unpacked.as_str()) {
        ("", _) => {}
        (layer, "") => snapshotter.record_sound(layer, id, &request.digest)?,
        (layer, unpacked) => response.mounted = snapshotter.heal_layer(layer, id, unpacked)?,
    }
    Ok(response)
}

/// The identity of the root. A database without one belongs to a root that was
/// never served.
fn root_of(store: &Store) -> Result<String> {
    Ok(store.read()?.fact(Identity::FACT)?.unwrap_or_default())
}

/// A command's connection to the daemon that serves its root.
pub struct HealingClient {
    client: Client,
    address: String,
    root: String,
}

impl HealingClient {
    /// Connects to the daemon at the socket `address`. The daemon has to serve the root of
    /// the database `store`.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::FailedPrecondition`] if the daemon is of another version, or serves
    /// another root; [`ErrorKind::Unavailable`] if no daemon answers.
    pub fn connect(address: &str, store: &Store) -> Result<HealingClient> {
        let channel = ChannelBuilder::new(Arc::new(EnvBuilder::new().cq_count(1).build()))
            .connect(&format!("unix:{}", encode_path(address.as_bytes())));
        let healing = HealingClient {
            client: Client::new(channel),
            address: address.to_owned(),
            root: root_of(store)?,
        };
        healing.call("", 0, "")?;
        Ok(healing)
    }

    /// Calls [`Snapshotter::heal_layer`] in the daemon, which then deletes what is not
    /// needed any more.
    ///
    /// # Errors
    ///
    /// Those of [`Snapshotter::heal_layer`]; [`ErrorKind::Unavailable`] if the daemon has
    /// ended. After the daemon's next start, the layer is either healed or unchanged.
    pub fn heal(&self, name: &str, id: SnapshotId, unpacked: &str) -> Result<Vec<String>> {
        Ok(self.call(name, id.number(), unpacked)?.mounted)
    }

    /// Calls [`Snapshotter::record_sound`] in the daemon.
    pub fn record_sound(&self, name: &str, id: SnapshotId, digest: &str) -> Result<()> {
        let request = HealRequest {
            layer: name.to_owned(),
            id: id.number(),
            digest: digest.to_owned(),
            ..HealRequest::default()
        };
        self.send(request).map(drop)
    }

    /// Calls [`Snapshotter::record_deep_check`] in the daemon.
    pub fn record_deep_check(&self, compared: u64, damaged: u64) -> Result<()> {
        let checked = Checked {
            compared,
            damaged,
            ..Checked::default()
        };
        let request = HealRequest {
            checked: Some(checked).into(),
            ..HealRequest::default()
        };
        self.send(request).map(drop)
    }

    fn call(&self, layer: &str, id: u64, unpacked: &str) -> Result<HealResponse> {
        self.send(HealRequest {
            layer: layer.to_owned(),
            id,
            unpacked: unpacked.to_owned(),
            ..HealRequest::default()
        })
    }

    fn send(&self, mut request: HealRequest) -> Result<HealResponse> {
        VERSION.clone_into(&mut request.version);
        self.root.clone_into(&mut request.root);
        let method = Method::Heal.on_wire(MethodType::Unary);
        let options = CallOption::default().timeout(PATIENCE);
        let answer = self.client.unary_call(&method, &encode(&request)?, options);
        decode(&answer.map_err(|error| self.failed(error))?)
    }

    fn failed(&self, error: grpcio::Error) -> Error {
        let daemon = format!("the daemon at {}", self.address);
        let grpcio::Error::RpcFailure(status) = &error else {
            return Error::caused(ErrorKind::Internal, format!("ask {daemon} to heal"), error);
        };
        match status.code() {
            RpcStatusCode::UNIMPLEMENTED => Error::refused(format!(
                "{daemon} is of an earlier version, which cannot heal: restart it, or stop it"
            )),
            RpcStatusCode::UNAVAILABLE => Error::new(
                ErrorKind::Unavailable,
                format!(
                    "{daemon} does not answer ({}): the layer is either healed or unchanged",
                    status.message()
                ),
            ),
            RpcStatusCode::DEADLINE_EXCEEDED => Error::new(
                ErrorKind::Unavailable,
                format!("{daemon} has not answered for {PATIENCE:?}, and may still heal"),
            ),
            code => {
                let kind = match code {
                    RpcStatusCode::NOT_FOUND => ErrorKind::NotFound,
                    RpcStatusCode::FAILED_PRECONDITION => ErrorKind::FailedPrecondition,
                    RpcStatusCode::RESOURCE_EXHAUSTED => ErrorKind::ResourceExhausted,
                    RpcStatusCode::DATA_LOSS => ErrorKind::DataLoss,
                    _ => ErrorKind::Internal,
                };
                Error::new(kind, format!("{daemon}: {}", status.message()))
            }
        }
    }
}
