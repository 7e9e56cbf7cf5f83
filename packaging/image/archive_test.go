package main

import (
	"archive/tar"
	"bytes"
	"debug/elf"
	"encoding/binary"
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

var someDate = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

// program is the least that is an ELF program: a header, and a program header if there is a loader.
func program(t *testing.T, machine elf.Machine, loader string) []byte {
	t.Helper()
	h := elf.Header64{Type: uint16(elf.ET_EXEC), Machine: uint16(machine), Version: 1, Phoff: 64, Ehsize: 64, Phentsize: 56, Shentsize: 64}
	copy(h.Ident[:], elf.ELFMAG)
	h.Ident[elf.EI_CLASS], h.Ident[elf.EI_DATA], h.Ident[elf.EI_VERSION] = byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), 1
	var progs []elf.Prog64
	if loader != "" {
		progs = append(progs, elf.Prog64{Type: uint32(elf.PT_INTERP), Off: 64 + 56, Filesz: uint64(len(loader) + 1)})
	}
	h.Phnum = uint16(len(progs))
	var b bytes.Buffer
	for _, part := range []any{h, progs} {
		if err := binary.Write(&b, binary.LittleEndian, part); err != nil {
			t.Fatal(err)
		}
	}
	if loader != "" {
		b.WriteString(loader + "\x00")
	}
	return b.Bytes()
}

// sample saves an archive with an image for each architecture.
func sample(t *testing.T, archs ...string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "image.tar")
	a := archive{date: someDate, blobs: make(map[string][]byte)}
	var images []descriptor
	for _, arch := range archs {
		agent := tree{}
		agent.program("bauta", program(t, machines[arch].elf, ""))
		layers, by, err := content{base: skeleton(), agent: agent}.layers(someDate)
		if err != nil {
			t.Fatal(err)
		}
		d, err := a.addImage(platform{arch, "linux", machines[arch].variant}, runConfig{Entrypoint: []string{"/bauta"}}, layers, by)
		if err != nil {
			t.Fatal(err)
		}
		images = append(images, d)
	}
	if err := a.save(file, "bauta.test/bauta:v1", images, map[string]string{"a": "b"}); err != nil {
		t.Fatal(err)
	}
	return file
}

func TestArchiveIsReadBack(t *testing.T) {
	for _, archs := range [][]string{{"amd64"}, {"arm64"}, {"amd64", "arm64"}} {
		file := sample(t, archs...)
		a, err := readArchive(file)
		if err != nil {
			t.Fatalf("%v: %v", archs, err)
		}
		var got []string
		for _, i := range a.images {
			got = append(got, i.config.Architecture)
			if n := i.files["etc/passwd"]; !strings.Contains(string(n.data), "root:x:0:0:") || !strings.Contains(string(n.data), "nobody:x:65534:") {
				t.Errorf("etc/passwd: %q", n.data)
			}
			if i.config.Created != "2026-01-02T03:04:05Z" || len(i.config.History) != len(i.manifest.Layers) {
				t.Errorf("%+v", i.config)
			}
		}
		if a.ref != "bauta.test/bauta:v1" || !slices.Equal(got, archs) {
			t.Errorf("%s %v, want bauta.test/bauta:v1 %v", a.ref, got, archs)
		}
		again, err := os.ReadFile(sample(t, archs...))
		if err != nil {
			t.Fatal(err)
		}
		if first, err := os.ReadFile(file); err != nil || !bytes.Equal(first, again) {
			t.Errorf("%v: another archive of the same content (%v)", archs, err)
		}
	}
}

// Whatever is changed in an archive, reading it finds out.
func TestReaderIsStrict(t *testing.T) {
	read := func() tree {
		f, err := os.Open(sample(t, "amd64", "arm64"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		files, err := readTar(f)
		if err != nil {
			t.Fatal(err)
		}
		return files
	}
	blob := func(files tree, kind string) string {
		var top, inner index
		parse := func(name string, to any) {
			if err := json.Unmarshal(files[name].data, to); err != nil {
				t.Fatal(err)
			}
		}
		name := func(d descriptor) string { return "blobs/" + strings.Replace(d.Digest, ":", "/", 1) }
		parse("index.json", &top)
		if kind == "index" {
			return name(top.Manifests[0])
		}
		parse(name(top.Manifests[0]), &inner)
		if kind == "manifest" {
			return name(inner.Manifests[1])
		}
		var m manifest
		parse(name(inner.Manifests[1]), &m)
		if kind == "config" {
			return name(m.Config)
		}
		return name(m.Layers[1])
	}
	var changes = map[string]func(tree){
		"something left over": func(f tree) { f.file("blobs/sha256/"+strings.Repeat("0", 64), nil) },
		"another layout":      func(f tree) { f.file("oci-layout", []byte(`{"imageLayoutVersion":"2.0.0"}`)) },
		"an unknown field": func(f tree) {
			f.file("index.json", bytes.Replace(f["index.json"].data, []byte(`{`), []byte(`{"x":1,`), 1))
		},
		"no name": func(f tree) { f.file("index.json", bytes.ReplaceAll(f["index.json"].data, []byte("bauta.test/"), nil)) },
		"another name and tag": func(f tree) {
			f.file("index.json", bytes.ReplaceAll(f["index.json"].data, []byte(`:v1`), []byte(`:v2`)))
		},
		"no images": func(f tree) { f.file("index.json", []byte(`{"schemaVersion":2,"manifests":[]}`)) },
	}
	for _, kind := range []string{"index", "manifest", "config", "layer"} {
		changes[kind+" missing"] = func(f tree) { delete(f, blob(f, kind)) }
		changes[kind+" longer"] = func(f tree) { name := blob(f, kind); f.file(name, append(slices.Clone(f[name].data), ' ')) }
		changes[kind+" changed"] = func(f tree) {
			name := blob(f, kind)
			data := slices.Clone(f[name].data)
			data[len(data)/2] ^= 1
			f.file(name, data)
		}
	}
	for what, change := range changes {
		files := read()
		change(files)
		var b bytes.Buffer
		if err := files.tar(&b, someDate); err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(t.TempDir(), "changed.tar")
		if err := os.WriteFile(file, b.Bytes(), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := readArchive(file); err == nil {
			t.Errorf("%s: taken", what)
		} else {
			t.Logf("%s: %v", what, err)
		}
	}
}

func TestUnsafeNodesAreRefused(t *testing.T) {
	for name, n := range map[string]node{
		"setuid":         {kind: tar.TypeReg, mode: 0o4755},
		"setgid":         {kind: tar.TypeReg, mode: 0o2755},
		"world-writable": {kind: tar.TypeReg, mode: 0o666},
		"group-writable": {kind: tar.TypeDir, mode: 0o775},
		"device":         {kind: tar.TypeChar, mode: 0o600},
		"bin/sh":         {kind: tar.TypeReg, mode: 0o755},
		"usr/bin/bash":   {kind: tar.TypeSymlink, mode: 0o777, target: "/bauta"},
	} {
		if _, err := (tree{name: n}).pack(someDate); err == nil {
			t.Errorf("%s: taken", name)
		}
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		if err := w.WriteHeader(&tar.Header{Name: name, Typeflag: n.kind, Mode: n.mode, Linkname: n.target}); err != nil {
			t.Fatal(err)
		}
		if _, err := readTar(&b); err == nil {
			t.Errorf("%s: read", name)
		}
	}
}

func TestTarOfOthersIsRefused(t *testing.T) {
	for what, list := range map[string][]tar.Header{
		"owner":    {{Name: "a", Uid: 1}},
		"twice":    {{Name: "a"}, {Name: "a"}},
		"unsorted": {{Name: "b"}, {Name: "a"}},
		"outside":  {{Name: "../a"}},
		"absolute": {{Name: "/a"}},
	} {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for _, h := range list {
			h.Typeflag, h.Mode = tar.TypeReg, 0o644
			if err := w.WriteHeader(&h); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := readTar(&b); err == nil {
			t.Errorf("%s: taken", what)
		}
	}
}

func TestPackNeedsNothingButTheTree(t *testing.T) {
	files := skeleton()
	files.file("z", bytes.Repeat([]byte("abc"), 1000))
	first, err := files.pack(someDate)
	if err != nil {
		t.Fatal(err)
	}
	again, err := maps.Clone(files).pack(someDate)
	if err != nil || !bytes.Equal(first.packed, again.packed) || first.diffID != again.diffID {
		t.Errorf("%v: another layer of the same tree", err)
	}
	// A gzip header without flags, date, and system: RFC 1952, 2.3.
	if want := []byte{0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 2, 255}; !bytes.Equal(first.packed[:10], want) {
		t.Errorf("header % x, want % x", first.packed[:10], want)
	}
	if later, err := files.pack(someDate.Add(time.Second)); err != nil || later.diffID == first.diffID {
		t.Errorf("%v: the date of files is not the one asked for", err)
	}
}

func TestUnpack(t *testing.T) {
	a, err := readArchive(sample(t, "amd64"))
	if err != nil {
		t.Fatal(err)
	}
	a.images[0].files.link("lib", "usr/lib")
	dir := filepath.Join(t.TempDir(), "root")
	if err := a.unpack(dir); err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(filepath.Join(dir, "bauta")); err != nil || st.Mode() != 0o755 {
		t.Errorf("%v, %v", st, err)
	}
	if target, err := os.Readlink(filepath.Join(dir, "lib")); target != "usr/lib" {
		t.Errorf("%q, %v", target, err)
	}
	if err := a.unpack(dir); err == nil {
		t.Error("unpacked over something")
	}
	// A link out of the folder, and a file through it.
	outside := t.TempDir()
	a.images[0].files.link("away", outside)
	a.images[0].files["away/file"] = node{kind: tar.TypeReg, mode: 0o644}
	if err := a.unpack(filepath.Join(t.TempDir(), "root")); err == nil {
		t.Error("followed a link out of the folder")
	}
	if left, err := os.ReadDir(outside); err != nil || len(left) > 0 {
		t.Errorf("%v, %v", left, err)
	}
	if several, err := readArchive(sample(t, "amd64", "arm64")); err != nil || several.unpack(filepath.Join(t.TempDir(), "root")) == nil {
		t.Errorf("%v: two images in one folder", err)
	}
}
