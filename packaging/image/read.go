package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"
)

// opened is an archive in which every descriptor was followed.
type opened struct {
	ref    string
	images []openedImage
}

type openedImage struct {
	descriptor
	manifest manifest
	config   imageConfig
	files    tree // all layers, one above the other
}

// readArchive is stricter than a container engine: nothing may be missing, differ from what refers to
// it, or be left over.
func readArchive(file string) (*opened, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	t, err := readTar(f)
	if err != nil {
		return nil, fmt.Errorf("archive: %w", err)
	}
	r := reader{t, map[string]bool{"oci-layout": true, "index.json": true}}
	var version struct{ ImageLayoutVersion string }
	if err := r.strict(t["oci-layout"].data, &version); err != nil || version.ImageLayoutVersion != "1.0.0" {
		return nil, fmt.Errorf("oci-layout %q: not that of an OCI archive", t["oci-layout"].data)
	}
	var top index
	if err := r.strict(t["index.json"].data, &top); err != nil {
		return nil, fmt.Errorf("index.json: %w", err)
	}
	if len(top.Manifests) != 1 {
		return nil, fmt.Errorf("index.json: %d names, want one", len(top.Manifests))
	}
	entry := top.Manifests[0]
	a := &opened{ref: entry.Annotations["io.containerd.image.name"]}
	if !references.MatchString(a.ref) || !strings.HasSuffix(a.ref, ":"+entry.Annotations["org.opencontainers.image.ref.name"]) {
		return nil, fmt.Errorf("index.json: image name %q", a.ref)
	}
	list := []descriptor{entry}
	if entry.MediaType == typeIndex {
		var inner index
		if err := r.follow(entry, typeIndex, &inner); err != nil {
			return nil, err
		}
		list = inner.Manifests
	}
	for _, d := range list {
		image, err := r.image(d)
		if err != nil {
			return nil, fmt.Errorf("manifest %s: %w", d.Digest, err)
		}
		a.images = append(a.images, image)
	}
	for name, n := range t {
		if n.kind == tar.TypeReg && !r.used[name] {
			return nil, fmt.Errorf("%s: nothing refers to it", name)
		}
	}
	return a, nil
}

type reader struct {
	tree
	used map[string]bool
}

func (r reader) strict(b []byte, to any) error {
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	return dec.Decode(to)
}

// blob is what d refers to.
func (r reader) blob(d descriptor, mediaType string) ([]byte, error) {
	name := "blobs/" + strings.Replace(d.Digest, ":", "/", 1)
	n, ok := r.tree[name]
	switch {
	case !ok:
		return nil, fmt.Errorf("%s: missing", name)
	case d.MediaType != mediaType:
		return nil, fmt.Errorf("%s: type %q, want %q", name, d.MediaType, mediaType)
	case int64(len(n.data)) != d.Size:
		return nil, fmt.Errorf("%s: %d bytes, want %d", name, len(n.data), d.Size)
	case digest(n.data) != d.Digest:
		return nil, fmt.Errorf("%s: content has digest %s", name, digest(n.data))
	}
	r.used[name] = true
	return n.data, nil
}

func (r reader) follow(d descriptor, mediaType string, to any) error {
	b, err := r.blob(d, mediaType)
	if err != nil {
		return err
	}
	if err := r.strict(b, to); err != nil {
		return fmt.Errorf("%s: %w", d.Digest, err)
	}
	return nil
}

func (r reader) image(d descriptor) (openedImage, error) {
	i := openedImage{descriptor: d, files: tree{}}
	if err := r.follow(d, typeManifest, &i.manifest); err != nil {
		return i, err
	}
	if err := r.follow(i.manifest.Config, typeConfig, &i.config); err != nil {
		return i, err
	}
	if d.Platform == nil || *d.Platform != i.config.platform {
		return i, fmt.Errorf("platform %v, but the image is for %v", d.Platform, i.config.platform)
	}
	if have, want := len(i.config.RootFS.DiffIDs), len(i.manifest.Layers); have != want {
		return i, fmt.Errorf("%d diff ids for %d layers", have, want)
	}
	for n, l := range i.manifest.Layers {
		packed, err := r.blob(l, typeLayer)
		if err != nil {
			return i, err
		}
		if err := i.unpack(packed, i.config.RootFS.DiffIDs[n]); err != nil {
			return i, fmt.Errorf("layer %d: %w", n+1, err)
		}
	}
	if err := i.files.checkPrograms(i.config.Architecture); err != nil {
		return i, err
	}
	return i, i.checkEntry()
}

func (i *openedImage) unpack(packed []byte, diffID string) error {
	z, err := gzip.NewReader(bytes.NewReader(packed))
	if err != nil {
		return err
	}
	plain, err := io.ReadAll(z)
	if err != nil {
		return err
	}
	if got := digest(plain); got != diffID {
		return fmt.Errorf("diff id %s, but the content has %s", diffID, got)
	}
	t, err := readTar(bytes.NewReader(plain))
	if err != nil {
		return err
	}
	for name, n := range t {
		if old, ok := i.files[name]; ok && n.kind != tar.TypeDir && old.kind != n.kind {
			return fmt.Errorf("%s: of another type than in a layer below", name)
		}
		i.files[name] = n
	}
	return nil
}

// checkEntry makes sure that the runtime finds what it shall start.
func (i *openedImage) checkEntry() error {
	if len(i.config.Config.Entrypoint) == 0 {
		return errors.New("no entry point")
	}
	entry := i.config.Config.Entrypoint[0]
	n, ok := i.files[strings.TrimPrefix(entry, "/")]
	if !ok || n.mode&0o111 == 0 {
		return fmt.Errorf("entry point %s: not a program of the image", entry)
	}
	if err := checkStatic(n.data, i.config.Architecture); err != nil {
		return fmt.Errorf("entry point %s: %w", entry, err)
	}
	return nil
}

// readTar takes sorted entries that belong to root only, as tree writes them.
func readTar(from io.Reader) (tree, error) {
	t, last := tree{}, ""
	for r := tar.NewReader(from); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return t, nil
		}
		if err != nil {
			return nil, err
		}
		name := path.Clean(h.Name)
		switch {
		case name <= last || path.IsAbs(name) || name == ".." || strings.HasPrefix(name, "../"):
			return nil, fmt.Errorf("%s after %s: not sorted, twice, or outside", h.Name, last)
		case h.Uid != 0 || h.Gid != 0:
			return nil, fmt.Errorf("%s: belongs to %d:%d", h.Name, h.Uid, h.Gid)
		}
		last = name
		if err := checkNode(name, h.Typeflag, h.Mode); err != nil {
			return nil, err
		}
		data, err := io.ReadAll(r)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", h.Name, err)
		}
		t[name] = node{kind: h.Typeflag, mode: h.Mode, target: h.Linkname, data: data}
	}
}

// describe prints what to compare with another build, and what a node has to load.
func (a *opened) describe(to io.Writer) error {
	var b strings.Builder
	fmt.Fprintf(&b, "%s\n", a.ref)
	for _, i := range a.images {
		var packed, unpacked int64
		for _, l := range i.manifest.Layers {
			packed += l.Size
		}
		files := 0
		for _, n := range i.files {
			unpacked += int64(len(n.data))
			if n.kind == tar.TypeReg {
				files++
			}
		}
		fmt.Fprintf(&b, "  %s/%s  %s  %d files, %.1f MB (%.1f MB packed)\n", i.config.OS, i.config.Architecture, i.Digest, files, mega(unpacked), mega(packed))
	}
	_, err := io.WriteString(to, b.String())
	return err
}

func mega(n int64) float64 { return float64(n) / 1e6 }
