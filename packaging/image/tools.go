package main

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"path"
	"regexp"
	"strings"
)

// triplets name the folders of libraries.
var triplets = map[string]string{"amd64": "x86_64-linux-gnu", "arm64": "aarch64-linux-gnu"}

// wanted is what iptables mode runs: both backends under the names that Bauta looks for, and all
// extensions, since rules of others are listed too.
var wanted = regexp.MustCompile(`^usr/sbin/(xtables-(nft|legacy)-multi|ip6?tables-(nft|legacy)(-save|-restore)?)$` +
	`|^usr/lib/[^/]+/xtables/lib[a-z0-9]+_[A-Za-z0-9]+\.so$` +
	`|^etc/protocols$|^usr/lib/os-release$|^etc/os-release$|^usr/share/common-licenses/.*$`)

// addTools puts the tools of iptables mode and what they need into the tree.
func addTools(ctx context.Context, to tree, arch string, packages []debPackage, files map[string]string) error {
	all, owner := tree{}, make(map[string]string)
	for _, p := range packages {
		t, err := unpackDeb(ctx, files[p.name])
		if err != nil {
			return fmt.Errorf("package %s: %w", p, err)
		}
		for name, n := range t {
			all[name] = n
			if n.kind != tar.TypeDir {
				owner[name] = p.name
			}
		}
		control, err := output(exec.CommandContext(ctx, "dpkg-deb", "--field", files[p.name]))
		if err != nil {
			return fmt.Errorf("package %s: %w", p, err)
		}
		// Where scanners look in images without a package manager.
		to.file("var/lib/dpkg/status.d/"+p.name, []byte(control))
		license, ok := t["usr/share/doc/"+p.name+"/copyright"]
		if !ok {
			return fmt.Errorf("package %s: no copyright file", p)
		}
		to.put("usr/share/doc/"+p.name+"/copyright", license)
	}
	c := closure{from: all, to: to, dir: "usr/lib/" + triplets[arch], owner: owner, used: make(map[string]bool)}
	// As on a Debian system; loaders are named with these paths.
	to.link("lib", "usr/lib")
	to.link("lib64", "usr/lib64")
	to.dir("usr/lib64")
	for name := range all {
		if wanted.MatchString(name) {
			if err := c.take(name); err != nil {
				return err
			}
		}
	}
	for _, p := range packages {
		if !c.used[p.name] {
			return fmt.Errorf("package %s: nothing in it is needed", p)
		}
	}
	return nil
}

// closure takes files with what they link to and need to run.
type closure struct {
	from, to tree
	dir      string // of libraries
	owner    map[string]string
	used     map[string]bool // packages
}

func (c *closure) take(name string) error {
	if _, ok := c.to[name]; ok {
		return nil
	}
	n, ok := c.from[name]
	if !ok {
		return fmt.Errorf("%s: in none of the packages", name)
	}
	c.to.put(name, n)
	c.used[c.owner[name]] = true
	if n.kind == tar.TypeSymlink {
		return c.take(resolveLink(name, n.target))
	}
	e, err := readELF(n.data)
	if err != nil || e == nil {
		return err
	}
	for _, lib := range e.libraries {
		if err := c.take(c.dir + "/" + lib); err != nil {
			return fmt.Errorf("%s needs %w", name, err)
		}
	}
	if e.loader != "" {
		if err := c.take("usr" + e.loader); err != nil { // /lib and /lib64 are links into /usr
			return fmt.Errorf("loader of %s: %w", name, err)
		}
	}
	return nil
}

// resolveLink is where a link leads, from the root.
func resolveLink(name, target string) string {
	if path.IsAbs(target) {
		return path.Clean(target)[1:]
	}
	return path.Join(path.Dir(name), target)
}

// unpackDeb reads the files of a package. Owners are dropped: all files of an image are root's.
func unpackDeb(ctx context.Context, file string) (tree, error) {
	out, err := output(exec.CommandContext(ctx, "dpkg-deb", "--fsys-tarfile", file))
	if err != nil {
		return nil, err
	}
	t := tree{}
	for r := tar.NewReader(strings.NewReader(out)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return t, nil
		}
		if err != nil {
			return nil, err
		}
		name := path.Clean(h.Name)
		if name == "." {
			continue
		}
		data, err := io.ReadAll(r)
		if err != nil {
			return nil, err
		}
		n := node{kind: h.Typeflag, mode: h.Mode & 0o777, target: h.Linkname, data: data}
		if n.kind == tar.TypeLink {
			n = t[path.Clean(h.Linkname)]
		}
		t[name] = n
	}
}
