package cluster

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"runtime"
)

// The images that this package makes out of the workload program.
const (
	PauseImage    = "bauta.test/pause:1"
	WorkloadImage = "bauta.test/workload:1"
)

// WriteImage writes an OCI archive of an image that has nothing but one program, at
// /program, with the arguments args.
func WriteImage(path, ref, program string, args ...string) error {
	binary, err := os.ReadFile(program)
	if err != nil {
		return err
	}
	layer, err := pack(0o755, file{"program", binary})
	if err != nil {
		return err
	}
	var packed bytes.Buffer
	z, _ := gzip.NewWriterLevel(&packed, gzip.BestSpeed) // the level is right
	if _, err := z.Write(layer); err != nil {
		return err
	}
	if err := z.Close(); err != nil {
		return err
	}
	type object = map[string]any
	platform := object{"architecture": runtime.GOARCH, "os": "linux"}
	config := encode(object{
		"architecture": runtime.GOARCH, "os": "linux",
		"config": object{"Entrypoint": append([]string{"/program"}, args...)},
		"rootfs": object{"type": "layers", "diff_ids": []string{digest(layer)}},
	})
	manifest := encode(object{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
		"config": describe("application/vnd.oci.image.config.v1+json", config),
		"layers": []object{describe("application/vnd.oci.image.layer.v1.tar+gzip", packed.Bytes())},
	})
	entry := describe("application/vnd.oci.image.manifest.v1+json", manifest)
	entry["platform"] = platform
	entry["annotations"] = object{"io.containerd.image.name": ref}
	index := encode(object{"schemaVersion": 2, "manifests": []object{entry}})

	archive, err := pack(0o644,
		file{"oci-layout", encode(object{"imageLayoutVersion": "1.0.0"})},
		file{"index.json", index},
		blob(config), blob(manifest), blob(packed.Bytes()))
	if err != nil {
		return err
	}
	return os.WriteFile(path, archive, 0o644)
}

type file struct {
	name string
	data []byte
}

func blob(b []byte) file { return file{"blobs/sha256/" + digest(b)[len("sha256:"):], b} }

func pack(mode int64, files ...file) ([]byte, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		if err := w.WriteHeader(&tar.Header{Name: f.name, Mode: mode, Size: int64(len(f.data))}); err != nil {
			return nil, err
		}
		if _, err := w.Write(f.data); err != nil {
			return nil, err
		}
	}
	return b.Bytes(), w.Close()
}

func digest(b []byte) string { return fmt.Sprintf("sha256:%x", sha256.Sum256(b)) }

func describe(kind string, b []byte) map[string]any {
	return map[string]any{"mediaType": kind, "digest": digest(b), "size": len(b)}
}

func encode(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err) // maps of strings and numbers
	}
	return b
}
