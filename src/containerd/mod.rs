//! A client of containerd, which lists the layers of images and makes containerd unpack them
//! again.
//!
//! Owns: the calls, and their time limits. Never: writes anything into containerd. The caller
//! provides the directories into which a layer is unpacked.

mod layers;

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context as Task, Poll, Waker};
use std::thread;
use std::time::Duration;

use futures_util::StreamExt;
use grpcio::{
    CallOption, ChannelBuilder, Client, EnvBuilder, Marshaller, MetadataBuilder, Method,
    MethodType, RpcStatusCode, pb_de, pb_ser,
};
use protobuf::MessageField;

use crate::error::{Error, ErrorKind, Result};
use crate::proto::content::{
    Info, InfoRequest, InfoResponse, ReadContentRequest, ReadContentResponse,
};
use crate::proto::diff::{ApplyRequest, ApplyResponse};
use crate::proto::images::{Image, ListImagesRequest, ListImagesResponse};
use crate::proto::mount::Mount as WireMount;
use crate::proto::namespaces::{ListNamespacesRequest, ListNamespacesResponse};
use crate::types::{Mount, Quoted};
pub use layers::{LayerSource, Sources, Standing};

macro_rules! method {
    ($name:ident, $kind:ident, $path:literal, $request:ty, $response:ty) => {
        static $name: Method<$request, $response> = Method {
            ty: MethodType::$kind,
            name: concat!("/containerd.services.", $path),
            req_mar: Marshaller {
                ser: pb_ser,
                de: pb_de,
            },
            resp_mar: Marshaller {
                ser: pb_ser,
                de: pb_de,
            },
        };
    };
}

method!(
    NAMESPACES,
    Unary,
    "namespaces.v1.Namespaces/List",
    ListNamespacesRequest,
    ListNamespacesResponse
);
method!(
    IMAGES,
    Unary,
    "images.v1.Images/List",
    ListImagesRequest,
    ListImagesResponse
);
method!(
    INFO,
    Unary,
    "content.v1.Content/Info",
    InfoRequest,
    InfoResponse
);
method!(
    READ,
    ServerStreaming,
    "content.v1.Content/Read",
    ReadContentRequest,
    ReadContentResponse
);
method!(
    APPLY,
    Unary,
    "diff.v1.Diff/Apply",
    ApplyRequest,
    ApplyResponse
);

/// The longest message that is accepted, as in containerd's own clients.
const MAX_MESSAGE_BYTES: i32 = 16 << 20;

/// The time limit of every call except an unpack, which has no limit.
const PATIENCE: Duration = Duration::from_secs(60);

/// A connection to containerd.
pub struct Containerd<'a> {
    client: Client,
    address: String,
    /// Once set, every call ends with [`ErrorKind::Cancelled`].
    cancel: &'a AtomicBool,
}

impl<'a> Containerd<'a> {
    /// Prepares a connection to the socket at `address`. The first call connects.
    pub fn new(address: &str, cancel: &'a AtomicBool) -> Containerd<'a> {
        let environment = Arc::new(EnvBuilder::new().cq_count(1).build());
        let channel = ChannelBuilder::new(environment)
            .max_receive_message_len(MAX_MESSAGE_BYTES)
            .connect(&format!("unix:{address}"));
        Containerd {
            client: Client::new(channel),
            address: address.to_owned(),
            cancel,
        }
    }

    fn namespaces(&self) -> Result<Vec<String>> {
        let request = ListNamespacesRequest::default();
        let listed = self.call(&NAMESPACES, &request, "", Some(PATIENCE));
        let listed = listed.map_err(|error| self.failed("list its namespaces", error))?;
        let names = listed.namespaces.into_iter().map(|found| found.name);
        Ok(names.collect())
    }

    fn images(&self, namespace: &str) -> Result<Vec<Image>> {
        let request = ListImagesRequest::default();
        let listed = self.call(&IMAGES, &request, namespace, Some(PATIENCE));
        let doing = || format!("list the images of namespace {}", Quoted(namespace));
        Ok(listed.map_err(|error| self.failed(doing(), error))?.images)
    }

    /// What containerd knows of the content with this digest; `None` if containerd does not
    /// have the content.
    fn content_info(&self, namespace: &str, digest: &str) -> Result<Option<Info>> {
        let request = InfoRequest {
            digest: digest.to_owned(),
            ..InfoRequest::default()
        };
        match self.call(&INFO, &request, namespace, Some(PATIENCE)) {
            Ok(found) => Ok(Some(found.info.unwrap_or_default())),
            Err(error) if is_not_found(&error) => Ok(None),
            Err(error) => Err(self.failed(format!("look for {}", Quoted(digest)), error)),
        }
    }

    /// The content with this digest, of at most `most` bytes; `None` if containerd does not
    /// have the content.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::DataLoss`] if the content is longer.
    fn read(&self, namespace: &str, digest: &str, most: usize) -> Result<Option<Vec<u8>>> {
        let doing = || format!("read {}", Quoted(digest));
        let request = ReadContentRequest {
            digest: digest.to_owned(),
            ..ReadContentRequest::default()
        };
        let options = options(namespace, Some(PATIENCE));
        let mut stream = options
            .and_then(|options| self.client.server_streaming(&READ, &request, options))
            .map_err(|error| self.failed(doing(), error))?;
        let mut content = Vec::new();
        loop {
            let poll = |task: &mut Task<'_>| match stream.poll_next_unpin(task) {
                Poll::Ready(next) => Poll::Ready(Ok(next)),
                Poll::Pending => Poll::Pending,
            };
            let next = self.wait(&mut || false, poll);
            match next.map_err(|error| self.failed(doing(), error))? {
                None => return Ok(Some(content)),
                Some(Err(error)) if is_not_found(&error) => return Ok(None),
                Some(Err(error)) => return Err(self.failed(doing(), error)),
                Some(Ok(part)) => content.extend_from_slice(&part.data),
            }
            if content.len() > most {
                stream.cancel();
                let what = format!("{} is longer than {most} bytes", Quoted(digest));
                return Err(Error::data_loss(what));
            }
        }
    }

    /// Makes containerd unpack a layer onto a mount. Returns the digest of the unpacked
    /// archive, which containerd computes while unpacking. `watch` is called now and then;
    /// if it returns an error, the unpack is stopped.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Cancelled`] if the command was interrupted; or an error of `watch`. In both
    /// cases, containerd may go on writing for a moment.
    pub fn unpack(
        &self,
        layer: &LayerSource,
        mount: &Mount,
        watch: &dyn Fn() -> Result<()>,
    ) -> Result<String> {
        let mount = WireMount {
            type_: mount.fs_type.to_owned(),
            source: mount.source.clone(),
            options: mount.options.clone(),
            ..WireMount::default()
        };
        let request = ApplyRequest {
            diff: MessageField::some(layer.blob.clone()),
            mounts: vec![mount],
            ..ApplyRequest::default()
        };
        let doing = || format!("unpack {}", Quoted(&layer.blob.digest));
        let mut stop = None;
        let mut is_stopped = || {
            stop = watch().err();
            stop.is_some()
        };
        let (namespace, patience) = (layer.namespace.as_str(), None);
        let applied = self.call_until(&mut is_stopped, &APPLY, &request, (namespace, patience));
        if let Some(error) = stop {
            return Err(error.while_doing(doing()));
        }
        let applied = applied.map_err(|error| self.failed(doing(), error))?;
        Ok(applied.applied.unwrap_or_default().digest)
    }

    fn call<Q, A: Unpin>(
        &self,
        method: &Method<Q, A>,
        request: &Q,
        namespace: &str,
        patience: Option<Duration>,
    ) -> grpcio::Result<A> {
        self.call_until(&mut || false, method, request, (namespace, patience))
    }

    fn call_until<Q, A: Unpin>(
        &self,
        is_stopped: &mut dyn FnMut() -> bool,
        method: &Method<Q, A>,
        request: &Q,
        (namespace, patience): (&str, Option<Duration>),
    ) -> grpcio::Result<A> {
        let options = options(namespace, patience)?;
        let mut call = self.client.unary_call_async(method, request, options)?;
        let answer = self.wait(is_stopped, |task| Future::poll(Pin::new(&mut call), task));
        if answer.is_err() {
            call.cancel();
        }
        answer
    }

    /// Waits for an answer. Stops waiting if the command was interrupted, or if `is_stopped`
    /// returns `true`.
    fn wait<T>(
        &self,
        is_stopped: &mut dyn FnMut() -> bool,
        mut poll: impl FnMut(&mut Task<'_>) -> Poll<grpcio::Result<T>>,
    ) -> grpcio::Result<T> {
        const LONGEST: Duration = Duration::from_millis(20);
        let mut pause = Duration::from_micros(100);
        loop {
            if let Poll::Ready(ready) = poll(&mut Task::from_waker(Waker::noop())) {
                return ready;
            }
            if self.cancel.load(Ordering::Relaxed) || is_stopped() {
                return Err(grpcio::Error::RemoteStopped);
            }
            thread::sleep(pause);
            pause = LONGEST.min(pause * 2);
        }
    }

    fn failed(&self, doing: impl Into<String>, error: grpcio::Error) -> Error {
        let address = &self.address;
        let doing = format!("ask containerd at {address} to {}", doing.into());
        let code = match &error {
            grpcio::Error::RpcFailure(status) => status.code(),
            _ => RpcStatusCode::UNKNOWN,
        };
        if self.cancel.load(Ordering::Relaxed) {
            return Error::new(ErrorKind::Cancelled, "the command was interrupted");
        }
        match (code, &error) {
            (RpcStatusCode::UNAVAILABLE, _) => Error::caused(
                ErrorKind::Unavailable,
                format!(
                    "{doing}: check that containerd is running, and that --containerd-address \
                     names its socket"
                ),
                error,
            ),
            (_, grpcio::Error::RpcFailure(status)) => {
                let what = format!("{doing}: {}", status.message());
                Error::new(kind_of(status.message()), what)
            }
            _ => Error::caused(ErrorKind::Internal, doing, error),
        }
    }
}

/// The kind of an error from containerd with this message. The message is all there is, because
/// containerd reports a failed system call only as the kernel's text.
fn kind_of(message: &str) -> ErrorKind {
    let is_full = |words: &&str| message.contains(*words);
    match ["no space left on device", "disk quota exceeded"]
        .iter()
        .any(is_full)
    {
        true => ErrorKind::ResourceExhausted,
        false => ErrorKind::Internal,
    }
}

/// The options of a call. The namespace is gRPC metadata, as with containerd's
/// own clients.
fn options(namespace: &str, patience: Option<Duration>) -> grpcio::Result<CallOption> {
    let mut options = CallOption::default();
    if let Some(patience) = patience {
        options = options.timeout(patience);
    }
    if !namespace.is_empty() {
        let mut metadata = MetadataBuilder::new();
        metadata.add_str("containerd-namespace", namespace)?;
        options = options.headers(metadata.build());
    }
    Ok(options)
}

fn is_not_found(error: &grpcio::Error) -> bool {
    matches!(error, grpcio::Error::RpcFailure(status) if status.code() == RpcStatusCode::NOT_FOUND)
}
