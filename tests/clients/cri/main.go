// A minimal client of containerd's CRI for the tests: it creates pods as the
// kubelet does, checks them, and removes them.
//
//	cri SOCKET IMAGE PODS [userns]
//
// With `userns`, each pod has ids of its own. The environment has ROOT, the image volume,
// WRITABLE, the writable volume, and CGROUP.
//
// Messages are built field by field, because Debian 12 has no package of CRI's
// API. The field numbers are those of
// k8s.io/cri-api/pkg/apis/runtime/v1/api.proto.
package main

import (
	"context"
	"fmt"
	"log"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protowire"
)

// message is an encoded message, or a part of one.
type message []byte

func text(field protowire.Number, value string) message {
	tagged := protowire.AppendTag(nil, field, protowire.BytesType)
	return protowire.AppendString(tagged, value)
}

func number(field protowire.Number, value uint64) message {
	tagged := protowire.AppendTag(nil, field, protowire.VarintType)
	return protowire.AppendVarint(tagged, value)
}

func nested(field protowire.Number, parts ...message) message {
	return text(field, string(joined(parts)))
}

func joined(parts []message) message {
	var all message
	for _, part := range parts {
		all = append(all, part...)
	}
	return all
}

// find returns the value at the path of fields: bytes unchanged, a number as digits.
func (m message) find(path ...protowire.Number) string {
	for rest := []byte(m); len(rest) > 0; {
		field, kind, length := protowire.ConsumeTag(rest)
		if length < 0 {
			log.Fatalf("not a message: %q", m)
		}
		rest = rest[length:]
		length = protowire.ConsumeFieldValue(field, kind, rest)
		if length < 0 {
			log.Fatalf("not a message: %q", m)
		}
		value := rest[:length]
		rest = rest[length:]
		if field != path[0] {
			continue
		}
		if kind == protowire.VarintType {
			digits, _ := protowire.ConsumeVarint(value)
			return strconv.FormatUint(digits, 10)
		}
		inner, _ := protowire.ConsumeBytes(value)
		if len(path) == 1 {
			return string(inner)
		}
		return message(inner).find(path[1:]...)
	}
	return ""
}

// raw passes messages on unchanged.
type raw struct{}

func (raw) Marshal(value interface{}) ([]byte, error) { return *value.(*message), nil }
func (raw) Unmarshal(data []byte, value interface{}) error {
	*value.(*message) = append(message(nil), data...)
	return nil
}
func (raw) Name() string { return "proto" }

var connection *grpc.ClientConn

// call calls a method of RuntimeService or ImageService, and ends the program if it fails.
func call(method string, parts ...message) message {
	service := "RuntimeService"
	if strings.Contains(method, "Image") {
		service = "ImageService"
	}
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Second)
	defer cancel()
	request, answer := joined(parts), message(nil)
	path := "/runtime.v1." + service + "/" + method
	if err := connection.Invoke(ctx, path, &request, &answer, grpc.ForceCodec(raw{})); err != nil {
		log.Fatalf("%s: %v", method, err)
	}
	return answer
}

// The runtime's value NODE: the pod has the network of the machine.
const node = 2

// pod creates one pod with one container, checks it, and removes it.
func pod(image string, index int, userns bool) {
	name := fmt.Sprintf("pod-%d", index)
	namespaces := nested(1, number(1, node), number(2, 1))
	// The id on the host of the container's root.
	root := 0
	if userns {
		// Each pod has another mapping, as with the kubelet.
		root = 100000 + 65536*index
		mapping := []message{number(1, uint64(root)), number(2, 0), number(3, 65536)}
		namespaces = nested(1, number(2, 1), nested(5, number(1, 0), nested(2, mapping...), nested(3, mapping...)))
	}
	// In LinuxSandboxSecurityContext namespaces are field 1, in the container's field 3.
	forContainer := append(message(nil), namespaces...)
	forContainer[0] = 3<<3 | 2
	sandbox := []message{
		nested(1, text(1, name), text(2, "uid-"+name), text(3, "default")),
		text(3, "/tmp/pods/"+name),
		nested(8, text(1, os.Getenv("CGROUP")), nested(2, namespaces)),
	}
	id := call("RunPodSandbox", nested(1, sandbox...)).find(1)
	container := call("CreateContainer", text(1, id), nested(2,
		nested(1, text(1, "main")),
		nested(2, text(1, image)),
		text(3, "/bin/sleep"), text(4, "100000"),
		nested(15, nested(2, forContainer)),
	), nested(3, sandbox...)).find(1)
	call("StartContainer", text(1, container))

	said := run(container, "cat /etc/motd; stat -c %u:%g /etc/motd /srv/odd /tmp; ls /opt/app;"+
		"dd if=/dev/zero of=/written bs=1M count=2 2>/dev/null; echo more >>/etc/motd; tail -n 1 /etc/motd")
	wanted := "motd of layer 5\n0:0\n1234:5678\n0:0\nonly.txt\nmore\n"
	if said != wanted {
		log.Fatalf("%s: the container printed %q, wanted %q", name, said, wanted)
	}
	statistics(name, container)
	if userns {
		ids := strings.Join(strings.Fields(run(container, "cat /proc/self/uid_map")), " ")
		if wanted := fmt.Sprintf("0 %d 65536", root); ids != wanted {
			log.Fatalf("%s: the ids are %q, wanted %q", name, ids, wanted)
		}
		writtenBy(name, root)
	}

	call("StopContainer", text(1, container), number(2, 0))
	call("RemoveContainer", text(1, container))
	call("StopPodSandbox", text(1, id))
	call("RemovePodSandbox", text(1, id))
}

// run runs a script in a container and returns what it prints.
func run(container, script string) string {
	answer := call("ExecSync", text(1, container), text(2, "/bin/sh"), text(2, "-c"), text(2, script), number(3, 60))
	if code := answer.find(3); code != "" && code != "0" {
		log.Fatalf("%q: exit code %s: %s", script, code, answer.find(2))
	}
	return answer.find(1)
}

// statistics waits until containerd, which only looks from time to time, reports what
// the container has written.
func statistics(name, container string) {
	used := ""
	for end := time.Now().Add(60 * time.Second); time.Now().Before(end); time.Sleep(time.Second) {
		// stats.writable_layer.used_bytes.value
		used = call("ContainerStats", text(1, container)).find(1, 4, 3, 1)
		if bytes, _ := strconv.Atoi(used); bytes >= 2<<20 {
			return
		}
	}
	log.Fatalf("%s: the statistics say %q bytes, wanted 2 MiB or more", name, used)
}

// writtenBy checks that the writable volume has the file /written of one container whose
// root has this id on the host.
func writtenBy(name string, root int) {
	written, err := filepath.Glob(os.Getenv("WRITABLE") + "/snapshots/*/fs/written")
	if err != nil {
		log.Fatal(err)
	}
	found := 0
	for _, path := range written {
		// Other pods end meanwhile.
		if info, err := os.Stat(path); err == nil && info.Sys().(*syscall.Stat_t).Uid == uint32(root) {
			found++
		}
	}
	if found != 1 {
		log.Fatalf("%s: %d of the files %q belong to the id %d, wanted one", name, found, written, root)
	}
}

func main() {
	log.SetFlags(0)
	if len(os.Args) < 4 {
		log.Fatal("usage: cri SOCKET IMAGE PODS [userns]")
	}
	image := os.Args[2]
	pods, err := strconv.Atoi(os.Args[3])
	if err != nil {
		log.Fatal(err)
	}
	connection, err = grpc.Dial("unix://"+os.Args[1], grpc.WithInsecure(), grpc.WithBlock(), grpc.WithTimeout(30*time.Second))
	if err != nil {
		log.Fatalf("%s: %v", os.Args[1], err)
	}
	call("PullImage", nested(1, text(1, image)))
	var all sync.WaitGroup
	for index := 0; index < pods; index++ {
		all.Add(1)
		go func(index int) {
			defer all.Done()
			pod(image, index, len(os.Args) > 4)
		}(index)
	}
	all.Wait()
	// image_filesystems.fs_id.mountpoint and .inodes_used.value
	answer := call("ImageFsInfo")
	if mountpoint := answer.find(1, 2, 1); mountpoint != os.Getenv("ROOT") {
		log.Fatalf("the image file system is said to be %q, wanted %q", mountpoint, os.Getenv("ROOT"))
	}
	call("RemoveImage", nested(1, text(1, image)))
}
