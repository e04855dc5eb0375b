//! A client of the snapshots API. It sends messages as bytes, so that a test
//! can also send bytes that are not a message.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures_executor::block_on;
use futures_util::StreamExt;
use grpcio::{
    CallOption, ChannelBuilder, ClientUnaryReceiver, EnvBuilder, Error, GrpcSlice, Marshaller,
    MessageReader, Method, MethodType, RpcStatusCode,
};
use overlay_read_write_splitting_snapshotter::proto::healing::{HealRequest, HealResponse};
use overlay_read_write_splitting_snapshotter::proto::mount::Mount;
use overlay_read_write_splitting_snapshotter::proto::snapshots::{
    CleanupRequest, CommitSnapshotRequest, Info, ListSnapshotsRequest, ListSnapshotsResponse,
    MountsRequest, MountsResponse, PrepareSnapshotRequest, PrepareSnapshotResponse,
    RemoveSnapshotRequest, StatSnapshotRequest, StatSnapshotResponse, UpdateSnapshotRequest,
    UpdateSnapshotResponse, UsageRequest, UsageResponse, ViewSnapshotRequest, ViewSnapshotResponse,
};
use protobuf::Message;
use protobuf::well_known_types::empty::Empty;
use protobuf::well_known_types::field_mask::FieldMask;

/// A refusal: the code and the text that a user would see.
pub type Refusal = (RpcStatusCode, String);
type Result<T> = std::result::Result<T, Refusal>;

/// A connection to the daemon.
pub struct Client {
    client: grpcio::Client,
}

macro_rules! method {
    ($name:literal, $kind:expr) => {{
        static METHOD: Method<Vec<u8>, Vec<u8>> = Method {
            ty: $kind,
            name: concat!("/containerd.services.snapshots.v1.Snapshots/", $name),
            req_mar: RAW,
            resp_mar: RAW,
        };
        &METHOD
    }};
}

const RAW: Marshaller<Vec<u8>> = Marshaller {
    ser: |bytes: &Vec<u8>, slice: &mut GrpcSlice| {
        *slice = GrpcSlice::from(bytes.as_slice());
        Ok(())
    },
    de: |mut reader: MessageReader| {
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut reader, &mut bytes)
            .map_err(|error| Error::Codec(error.into()))?;
        Ok(bytes)
    },
};

/// Longer than any intended wait of a test.
const LIMIT: Duration = Duration::from_secs(120);

fn options() -> CallOption {
    CallOption::default().timeout(LIMIT)
}

fn refusal(error: Error) -> Refusal {
    match error {
        Error::RpcFailure(status) => (status.code(), status.message().to_owned()),
        other => panic!("the call itself failed: {other:?}"),
    }
}

/// Waits for the end of a request that was begun.
pub fn finish(receiver: ClientUnaryReceiver<Vec<u8>>) -> Result<Vec<u8>> {
    block_on(receiver).map_err(refusal)
}

/// Labels from pairs.
pub fn labels(pairs: &[(&str, &str)]) -> HashMap<String, String> {
    pairs
        .iter()
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
        .collect()
}

impl Client {
    /// Connects to a socket.
    pub fn connect(address: &str) -> Client {
        let environment = Arc::new(EnvBuilder::new().cq_count(1).build());
        let channel = ChannelBuilder::new(environment)
            .use_local_subchannel_pool(true)
            .connect(&format!("unix:{address}"));
        Client {
            client: grpcio::Client::new(channel),
        }
    }

    fn call<Q: Message, A: Message>(
        &self,
        method: &Method<Vec<u8>, Vec<u8>>,
        request: &Q,
    ) -> Result<A> {
        let bytes = self.call_raw(method, request.write_to_bytes().unwrap())?;
        Ok(A::parse_from_bytes(&bytes).unwrap())
    }

    fn call_raw(&self, method: &Method<Vec<u8>, Vec<u8>>, bytes: Vec<u8>) -> Result<Vec<u8>> {
        self.client
            .unary_call(method, &bytes, options())
            .map_err(refusal)
    }

    /// Sends these bytes to any method of the service, including List; for
    /// List, the first message of the answer is returned, if there is one.
    pub fn send(&self, method: &'static str, bytes: &[u8]) -> Result<Vec<u8>> {
        let kind = match method {
            "List" => MethodType::ServerStreaming,
            _ => MethodType::Unary,
        };
        let path = format!("/containerd.services.snapshots.v1.Snapshots/{method}");
        let named = Method {
            ty: kind,
            name: path.leak(),
            req_mar: RAW,
            resp_mar: RAW,
        };
        if method != "List" {
            return self.call_raw(&named, bytes.to_vec());
        }
        let mut receiver = self
            .client
            .server_streaming(&named, &bytes.to_vec(), options())
            .unwrap();
        match block_on(receiver.next()) {
            None => Ok(Vec::new()),
            Some(page) => page.map_err(refusal),
        }
    }

    /// Asks the daemon, as `check --heal` does.
    pub fn heal(&self, request: &HealRequest) -> Result<HealResponse> {
        let named = Method {
            ty: MethodType::Unary,
            name: "/overlay_read_write_splitting_snapshotter.healing.v1.Healing/Heal",
            req_mar: RAW,
            resp_mar: RAW,
        };
        self.call(&named, request)
    }

    fn begin<Q: Message>(
        &self,
        method: &Method<Vec<u8>, Vec<u8>>,
        request: &Q,
        options: CallOption,
    ) -> ClientUnaryReceiver<Vec<u8>> {
        let bytes = request.write_to_bytes().unwrap();
        self.client
            .unary_call_async(method, &bytes, options)
            .unwrap()
    }

    /// Begins a Prepare. [`finish`] waits for its end.
    pub fn begin_prepare(
        &self,
        key: &str,
        parent: &str,
        with: &[(&str, &str)],
    ) -> ClientUnaryReceiver<Vec<u8>> {
        let request = PrepareSnapshotRequest {
            key: key.to_owned(),
            parent: parent.to_owned(),
            labels: labels(with),
            ..Default::default()
        };
        self.begin(method!("Prepare", MethodType::Unary), &request, options())
    }

    /// Begins a Remove.
    pub fn begin_remove(&self, key: &str) -> ClientUnaryReceiver<Vec<u8>> {
        let request = RemoveSnapshotRequest {
            key: key.to_owned(),
            ..Default::default()
        };
        self.begin(method!("Remove", MethodType::Unary), &request, options())
    }

    /// Begins a Cleanup that waits no longer than `limit`.
    pub fn begin_cleanup(&self, limit: Duration) -> ClientUnaryReceiver<Vec<u8>> {
        self.begin(
            method!("Cleanup", MethodType::Unary),
            &CleanupRequest::new(),
            CallOption::default().timeout(limit),
        )
    }

    /// Sends these bytes as a Prepare request.
    pub fn prepare_raw(&self, bytes: Vec<u8>) -> Result<Vec<u8>> {
        self.call_raw(method!("Prepare", MethodType::Unary), bytes)
    }

    pub fn prepare(&self, key: &str, parent: &str, with: &[(&str, &str)]) -> Result<Vec<Mount>> {
        let request = PrepareSnapshotRequest {
            key: key.to_owned(),
            parent: parent.to_owned(),
            labels: labels(with),
            ..Default::default()
        };
        let response: PrepareSnapshotResponse =
            self.call(method!("Prepare", MethodType::Unary), &request)?;
        Ok(response.mounts)
    }

    pub fn view(&self, key: &str, parent: &str, with: &[(&str, &str)]) -> Result<Vec<Mount>> {
        let request = ViewSnapshotRequest {
            key: key.to_owned(),
            parent: parent.to_owned(),
            labels: labels(with),
            ..Default::default()
        };
        let response: ViewSnapshotResponse =
            self.call(method!("View", MethodType::Unary), &request)?;
        Ok(response.mounts)
    }

    pub fn mounts(&self, key: &str) -> Result<Vec<Mount>> {
        let request = MountsRequest {
            key: key.to_owned(),
            ..Default::default()
        };
        let response: MountsResponse = self.call(method!("Mounts", MethodType::Unary), &request)?;
        Ok(response.mounts)
    }

    pub fn commit(&self, key: &str, name: &str, with: &[(&str, &str)]) -> Result<()> {
        self.commit_onto(key, name, "", with)
    }

    /// A commit that names the parent (rebase).
    pub fn commit_onto(
        &self,
        key: &str,
        name: &str,
        parent: &str,
        with: &[(&str, &str)],
    ) -> Result<()> {
        let request = CommitSnapshotRequest {
            key: key.to_owned(),
            name: name.to_owned(),
            parent: parent.to_owned(),
            labels: labels(with),
            ..Default::default()
        };
        self.call::<_, Empty>(method!("Commit", MethodType::Unary), &request)
            .map(drop)
    }

    pub fn remove(&self, key: &str) -> Result<()> {
        let request = RemoveSnapshotRequest {
            key: key.to_owned(),
            ..Default::default()
        };
        self.call::<_, Empty>(method!("Remove", MethodType::Unary), &request)
            .map(drop)
    }

    pub fn stat(&self, key: &str) -> Result<Info> {
        let request = StatSnapshotRequest {
            key: key.to_owned(),
            ..Default::default()
        };
        let response: StatSnapshotResponse =
            self.call(method!("Stat", MethodType::Unary), &request)?;
        Ok(response.info.unwrap())
    }

    pub fn update(&self, key: &str, mask: &[&str], with: &[(&str, &str)]) -> Result<Info> {
        let info = Info {
            name: key.to_owned(),
            labels: labels(with),
            ..Default::default()
        };
        let mask = FieldMask {
            paths: mask.iter().map(ToString::to_string).collect(),
            ..Default::default()
        };
        let request = UpdateSnapshotRequest {
            info: Some(info).into(),
            update_mask: Some(mask).into(),
            ..Default::default()
        };
        let response: UpdateSnapshotResponse =
            self.call(method!("Update", MethodType::Unary), &request)?;
        Ok(response.info.unwrap())
    }

    pub fn usage(&self, key: &str) -> Result<UsageResponse> {
        let request = UsageRequest {
            key: key.to_owned(),
            ..Default::default()
        };
        self.call(method!("Usage", MethodType::Unary), &request)
    }

    /// Begins a Usage, which its caller may cancel.
    pub fn begin_usage(&self, key: &str) -> ClientUnaryReceiver<Vec<u8>> {
        let request = UsageRequest {
            key: key.to_owned(),
            ..Default::default()
        };
        self.begin(method!("Usage", MethodType::Unary), &request, options())
    }

    pub fn cleanup(&self) -> Result<()> {
        self.call::<_, Empty>(
            method!("Cleanup", MethodType::Unary),
            &CleanupRequest::new(),
        )
        .map(drop)
    }

    /// Begins a List; its messages are taken from the receiver one by one.
    pub fn begin_list(&self, filters: &[&str]) -> grpcio::ClientSStreamReceiver<Vec<u8>> {
        let request = ListSnapshotsRequest {
            filters: filters.iter().map(ToString::to_string).collect(),
            ..Default::default()
        };
        let bytes = request.write_to_bytes().unwrap();
        let method = method!("List", MethodType::ServerStreaming);
        self.client
            .server_streaming(method, &bytes, options())
            .unwrap()
    }

    /// A List, message by message.
    pub fn list_pages(&self, filters: &[&str]) -> Result<Vec<Vec<Info>>> {
        let mut receiver = self.begin_list(filters);
        let mut pages = Vec::new();
        while let Some(page) = block_on(receiver.next()) {
            let page = page.map_err(refusal)?;
            pages.push(ListSnapshotsResponse::parse_from_bytes(&page).unwrap().info);
        }
        Ok(pages)
    }

    /// The names in a List.
    pub fn names(&self, filters: &[&str]) -> Result<Vec<String>> {
        let pages = self.list_pages(filters)?;
        Ok(pages.into_iter().flatten().map(|info| info.name).collect())
    }

    /// Whether the daemon knows the key or name.
    pub fn exists(&self, key: &str) -> bool {
        match self.stat(key) {
            Ok(_) => true,
            Err((RpcStatusCode::NOT_FOUND, _)) => false,
            Err(refusal) => panic!("stat {key:?}: {refusal:?}"),
        }
    }
}
