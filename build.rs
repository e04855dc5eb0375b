//! Generates Rust messages from the files under `proto/`, in pure Rust: neither
//! `protoc` nor a plugin has to be installed.

fn main() {
    println!("cargo::rerun-if-changed=proto");
    protobuf_codegen::Codegen::new()
        .pure()
        .include("proto")
        .input("proto/containerd/types/descriptor.proto")
        .input("proto/containerd/types/mount.proto")
        .input("proto/containerd/services/content/v1/content.proto")
        .input("proto/containerd/services/diff/v1/diff.proto")
        .input("proto/containerd/services/images/v1/images.proto")
        .input("proto/containerd/services/namespaces/v1/namespaces.proto")
        .input("proto/containerd/services/snapshots/v1/snapshots.proto")
        .input("proto/healing/v1/healing.proto")
        .customize(protobuf_codegen::Customize::default().lite_runtime(true))
        .cargo_out_dir("proto")
        .run_from_script();
}
