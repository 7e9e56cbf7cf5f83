package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"
)

const (
	docs        = "usr/share/doc/bauta"
	sbomPath    = docs + "/sbom.spdx.json"
	searchPath  = "/usr/sbin:/usr/bin:/sbin:/bin"
	homepage    = "https://bauta.dev"
	description = "Source NAT (masquerading) for pods, containers and virtual machines of a Linux node, in eBPF"
)

// variants say what there is besides the agent.
var variants = map[string]struct{ title, description, licenses string }{
	ebpf:     {"Bauta", description, ownLicense},
	iptables: {"Bauta, with iptables", description + "; with the tools of iptables mode", ownLicense + " AND GPL-2.0-only AND GPL-2.0-or-later AND LGPL-2.1-or-later"},
}

// write makes the archive and its SBOMs.
func (r *request) write(ctx context.Context, progress io.Writer) error {
	s, err := readSource(ctx, r.root, r.version)
	if err != nil {
		return err
	}
	ref, err := r.reference(s.version)
	if err != nil {
		return err
	}
	labels := r.labels(s)
	a := archive{date: s.date, blobs: make(map[string][]byte)}
	var images []descriptor
	for _, arch := range r.archs {
		fmt.Fprintf(progress, "%s/%s: building\n", r.variant, arch)
		c, err := r.collect(ctx, arch, s)
		if err != nil {
			return fmt.Errorf("%s: %w", arch, err)
		}
		layers, by, err := c.layers(s.date)
		if err != nil {
			return fmt.Errorf("%s: %w", arch, err)
		}
		run := runConfig{User: "0:0", Env: []string{"PATH=" + searchPath}, Entrypoint: []string{"/bauta"}, WorkingDir: "/", Labels: labels}
		d, err := a.addImage(platform{arch, "linux", machines[arch].variant}, run, layers, by)
		if err != nil {
			return err
		}
		images = append(images, d)
		sbom := r.out + ".spdx.json"
		if len(r.archs) > 1 {
			sbom = r.out + "." + arch + ".spdx.json"
		}
		if err := replace(sbom, func(w io.Writer) error { _, err := w.Write(c.sbom); return err }); err != nil {
			return err
		}
	}
	return a.save(r.out, ref, images, labels)
}

// labels are the same for all architectures.
func (r *request) labels(s source) map[string]string {
	v := variants[r.variant]
	labels := map[string]string{
		"org.opencontainers.image.title":       v.title,
		"org.opencontainers.image.description": v.description,
		"org.opencontainers.image.url":         homepage,
		"org.opencontainers.image.source":      homepage,
		"org.opencontainers.image.version":     s.version,
		"org.opencontainers.image.licenses":    v.licenses,
		"org.opencontainers.image.created":     s.date.Format(time.RFC3339),
		"org.opencontainers.image.vendor":      "Bauta",
	}
	if s.commit != "" {
		labels["org.opencontainers.image.revision"] = s.commit
	}
	return labels
}

// content is what an image of one architecture has in it.
type content struct {
	base  tree // changes seldom, so that nodes keep it from version to version
	agent tree
	sbom  []byte
}

func (r *request) collect(ctx context.Context, arch string, s source) (content, error) {
	c := content{base: skeleton(), agent: tree{}}
	binary, err := buildBinary(ctx, r.root, arch, s)
	if err != nil {
		return content{}, err
	}
	c.agent.program("bauta", binary)
	license, err := os.ReadFile(filepath.Join(r.root, "LICENSE"))
	if err != nil {
		return content{}, err
	}
	c.agent.file(docs+"/LICENSE", license)
	mods, err := modules(ctx, r.root, binary)
	if err != nil {
		return content{}, err
	}
	for _, m := range mods {
		for name, text := range m.texts {
			c.agent.file(docs+"/modules/"+m.path+"/"+name, text)
		}
	}
	doc := newDocument(s, r.variant, arch, binary)
	doc.addModules(mods)
	if r.variant == iptables {
		l, err := readLock(lockText)
		if err != nil {
			return content{}, err
		}
		files, err := fetchPackages(ctx, l, arch)
		if err != nil {
			return content{}, err
		}
		if err := addTools(ctx, c.base, arch, l.of(arch), files); err != nil {
			return content{}, err
		}
		doc.addPackages(l.of(arch))
	}
	if c.sbom, err = json.MarshalIndent(doc, "", "  "); err != nil {
		return content{}, err
	}
	c.sbom = append(c.sbom, '\n')
	c.agent.file(sbomPath, c.sbom)
	return c, nil
}

func (c content) layers(date time.Time) ([]layer, []string, error) {
	base, err := c.base.pack(date)
	if err != nil {
		return nil, nil, err
	}
	agent, err := c.agent.pack(date)
	return []layer{base, agent}, []string{"packaging/image: base", "packaging/image: bauta"}, err
}

// skeleton is what any program may expect: names for its user, and where the runtime mounts.
func skeleton() tree {
	t := tree{}
	t.file("etc/passwd", []byte("root:x:0:0:root:/:/nonexistent\nnobody:x:65534:65534:nobody:/nonexistent:/nonexistent\n"))
	t.file("etc/group", []byte("root:x:0:\nnogroup:x:65534:\n"))
	for _, d := range []string{"dev", "etc/bauta", "proc", "run/bauta", "sys"} {
		t.dir(d)
	}
	return t
}
