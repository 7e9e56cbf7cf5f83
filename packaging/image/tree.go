package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"time"
)

// node is a file, a folder or a link of the image. Everything belongs to root.
type node struct {
	kind   byte // tar's type
	mode   int64
	target string
	data   []byte
}

// tree has the nodes by their path, without the leading slash.
type tree map[string]node

func (t tree) dir(name string) { t.put(name, node{kind: tar.TypeDir, mode: 0o755}) }
func (t tree) file(name string, data []byte) {
	t.put(name, node{kind: tar.TypeReg, mode: 0o644, data: data})
}
func (t tree) program(name string, data []byte) {
	t.put(name, node{kind: tar.TypeReg, mode: 0o755, data: data})
}
func (t tree) link(name, target string) {
	t.put(name, node{kind: tar.TypeSymlink, mode: 0o777, target: target})
}

// put adds a node, with the folders above it.
func (t tree) put(name string, n node) {
	t[name] = n
	if dir := path.Dir(name); dir != "." {
		if _, ok := t[dir]; !ok {
			t.dir(dir)
		}
	}
}

// layer is a tree as registries keep it.
type layer struct {
	packed []byte
	diffID string // digest of the tar file
}

// pack writes the nodes in the order of their paths, which puts folders before what is in them.
func (t tree) pack(date time.Time) (layer, error) {
	var plain bytes.Buffer
	if err := t.tar(&plain, date); err != nil {
		return layer{}, err
	}
	packed, err := compress(plain.Bytes())
	return layer{packed: packed, diffID: digest(plain.Bytes())}, err
}

// compress has no name, date or system in the header: those would differ between machines.
func compress(plain []byte) ([]byte, error) {
	var packed bytes.Buffer
	z, err := gzip.NewWriterLevel(&packed, gzip.BestCompression)
	if err != nil {
		return nil, err
	}
	if _, err := z.Write(plain); err != nil {
		return nil, err
	}
	if err := z.Close(); err != nil {
		return nil, err
	}
	return packed.Bytes(), nil
}

func (t tree) tar(to io.Writer, date time.Time) error {
	w := tar.NewWriter(to)
	for _, name := range slices.Sorted(maps.Keys(t)) {
		n := t[name]
		if err := checkNode(name, n.kind, n.mode); err != nil {
			return err
		}
		if n.kind == tar.TypeDir {
			name += "/"
		}
		h := &tar.Header{Typeflag: n.kind, Name: name, Linkname: n.target, Mode: n.mode, Size: int64(len(n.data)), ModTime: date, Format: tar.FormatUSTAR}
		if err := w.WriteHeader(h); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if _, err := w.Write(n.data); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return w.Close()
}

// checkNode refuses what an image that runs as root must not hold.
func checkNode(name string, kind byte, mode int64) error {
	switch {
	case kind != tar.TypeReg && kind != tar.TypeDir && kind != tar.TypeSymlink:
		return fmt.Errorf("%s: a node of type %q", name, kind)
	case mode&^0o777 != 0:
		return fmt.Errorf("%s: mode %#o has setuid, setgid or sticky", name, mode)
	case kind != tar.TypeSymlink && mode&0o022 != 0:
		return fmt.Errorf("%s: mode %#o lets others write", name, mode)
	case slices.Contains(shells, path.Base(name)):
		return fmt.Errorf("%s: a shell", name)
	}
	return nil
}

// shells must not be in an image: who gets into the agent shall find nothing to work with.
var shells = []string{"sh", "ash", "bash", "busybox", "csh", "dash", "ksh", "perl", "python3", "tcsh", "toybox", "zsh"}
