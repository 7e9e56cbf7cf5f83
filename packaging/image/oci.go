package main

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

const (
	typeIndex    = "application/vnd.oci.image.index.v1+json"
	typeManifest = "application/vnd.oci.image.manifest.v1+json"
	typeConfig   = "application/vnd.oci.image.config.v1+json"
	typeLayer    = "application/vnd.oci.image.layer.v1.tar+gzip"
)

// descriptor refers to a blob.
type descriptor struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Size        int64             `json:"size"`
	Platform    *platform         `json:"platform,omitempty"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

type platform struct {
	Architecture string `json:"architecture"`
	OS           string `json:"os"`
	Variant      string `json:"variant,omitempty"`
}

type index struct {
	SchemaVersion int               `json:"schemaVersion"`
	MediaType     string            `json:"mediaType"`
	Manifests     []descriptor      `json:"manifests"`
	Annotations   map[string]string `json:"annotations,omitempty"`
}

type manifest struct {
	SchemaVersion int               `json:"schemaVersion"`
	MediaType     string            `json:"mediaType"`
	Config        descriptor        `json:"config"`
	Layers        []descriptor      `json:"layers"`
	Annotations   map[string]string `json:"annotations,omitempty"`
}

// imageConfig says how the image is run.
type imageConfig struct {
	Created string `json:"created"`
	platform
	Config  runConfig `json:"config"`
	RootFS  rootFS    `json:"rootfs"`
	History []history `json:"history"`
}

type runConfig struct {
	User       string
	Env        []string
	Entrypoint []string
	WorkingDir string
	Labels     map[string]string
}

type rootFS struct {
	Type    string   `json:"type"`
	DiffIDs []string `json:"diff_ids"`
}

type history struct {
	Created   string `json:"created"`
	CreatedBy string `json:"created_by"`
}

func digest(b []byte) string {
	sum := sha256.Sum256(b)
	return "sha256:" + hex.EncodeToString(sum[:])
}

// archive collects the blobs of one or more images.
type archive struct {
	date  time.Time
	blobs map[string][]byte // by digest
}

func (a *archive) add(mediaType string, blob []byte) descriptor {
	d := digest(blob)
	a.blobs[d] = blob
	return descriptor{MediaType: mediaType, Digest: d, Size: int64(len(blob))}
}

func (a *archive) addJSON(mediaType string, v any) (descriptor, error) {
	b, err := json.Marshal(v)
	return a.add(mediaType, b), err
}

// addImage puts layers under one manifest. by says how each layer was made.
func (a *archive) addImage(p platform, c runConfig, layers []layer, by []string) (descriptor, error) {
	created := a.date.Format(time.RFC3339)
	conf := imageConfig{Created: created, platform: p, Config: c, RootFS: rootFS{Type: "layers"}}
	m := manifest{SchemaVersion: 2, MediaType: typeManifest, Annotations: c.Labels}
	for i, l := range layers {
		conf.RootFS.DiffIDs = append(conf.RootFS.DiffIDs, l.diffID)
		conf.History = append(conf.History, history{created, by[i]})
		m.Layers = append(m.Layers, a.add(typeLayer, l.packed))
	}
	var err error
	if m.Config, err = a.addJSON(typeConfig, conf); err != nil {
		return descriptor{}, err
	}
	d, err := a.addJSON(typeManifest, m)
	d.Platform = &p
	return d, err
}

// save writes the archive under a name of its own first, so that nobody finds half of one. Several
// images become one with an index: a name stands for all of them.
func (a *archive) save(file, ref string, images []descriptor, labels map[string]string) error {
	top := images[0]
	if len(images) > 1 {
		var err error
		top, err = a.addJSON(typeIndex, index{SchemaVersion: 2, MediaType: typeIndex, Manifests: images, Annotations: labels})
		if err != nil {
			return err
		}
	}
	// containerd reads the first name, others the second.
	top.Annotations = map[string]string{"io.containerd.image.name": ref, "org.opencontainers.image.ref.name": ref[strings.LastIndex(ref, ":")+1:]}
	entry, err := json.Marshal(index{SchemaVersion: 2, MediaType: typeIndex, Manifests: []descriptor{top}})
	if err != nil {
		return err
	}
	t := tree{}
	t.file("oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`))
	t.file("index.json", entry)
	for _, d := range slices.Sorted(maps.Keys(a.blobs)) {
		t.file("blobs/"+strings.Replace(d, ":", "/", 1), a.blobs[d])
	}
	return replace(file, func(w io.Writer) error { return t.tar(w, a.date) })
}

// replace writes a file as a whole or not at all.
func replace(file string, write func(io.Writer) error) error {
	f, err := os.CreateTemp(filepath.Dir(file), "."+filepath.Base(file)+"-")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	if err := errors.Join(write(f), f.Chmod(0o644), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), file)
}
