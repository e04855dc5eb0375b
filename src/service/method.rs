//! The methods of containerd's snapshots API, and the method that `check --heal`
//! calls.

use grpcio::{GrpcSlice, Marshaller, MessageReader, MethodType};

macro_rules! methods {
    ($($service:literal: $($method:ident)*;)*) => {
        /// A method of one of the two APIs.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(super) enum Method {
            $($($method),*),*
        }

        impl Method {
            /// All methods, in the order of their numbers.
            pub const ALL: &[Method] = &[$($(Method::$method),*),*];

            pub fn name(self) -> &'static str {
                match self {
                    $($(Method::$method => stringify!($method)),*),*
                }
            }

            fn path(self) -> &'static str {
                match self {
                    $($(Method::$method => concat!("/", $service, "/", stringify!($method))),*),*
                }
            }
        }
    };
}

methods! {
    "containerd.services.snapshots.v1.Snapshots":
        Prepare View Mounts Commit Remove Stat Update List Usage Cleanup;
    "overlay_read_write_splitting_snapshotter.healing.v1.Healing": Heal;
}

impl Method {
    /// The method as gRPC registers it, with messages as bytes.
    pub fn on_wire(self, kind: MethodType) -> grpcio::Method<Vec<u8>, Vec<u8>> {
        let raw = || Marshaller {
            ser: |bytes: &Vec<u8>, slice: &mut GrpcSlice| {
                *slice = GrpcSlice::from(bytes.as_slice());
                Ok(())
            },
            de: |mut reader: MessageReader| {
                let mut bytes = Vec::with_capacity(reader.len());
                std::io::Read::read_to_end(&mut reader, &mut bytes)
                    .map_err(|error| grpcio::Error::Codec(error.into()))?;
                Ok(bytes)
            },
        };
        grpcio::Method {
            ty: kind,
            name: self.path(),
            req_mar: raw(),
            resp_mar: raw(),
        }
    }
}
