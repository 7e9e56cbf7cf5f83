package main

import (
	"archive/tar"
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"strings"
)

// elfFile is what a program or a library asks of its surroundings.
type elfFile struct {
	machine   elf.Machine
	loader    string // "" for static programs and libraries
	libraries []string
}

// readELF returns nil for anything but an ELF file.
func readELF(b []byte) (*elfFile, error) {
	if !bytes.HasPrefix(b, []byte(elf.ELFMAG)) {
		return nil, nil
	}
	f, err := elf.NewFile(bytes.NewReader(b))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	e := &elfFile{machine: f.Machine}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			text, err := io.ReadAll(p.Open())
			if err != nil {
				return nil, err
			}
			e.loader = strings.TrimRight(string(text), "\x00")
		}
	}
	if e.libraries, err = f.ImportedLibraries(); err != nil {
		return nil, err
	}
	return e, nil
}

// checkStatic refuses a binary that another machine, a loader or libraries would be needed for.
func checkStatic(b []byte, arch string) error {
	e, err := readELF(b)
	switch {
	case err != nil:
		return err
	case e == nil:
		return errors.New("not an ELF program")
	case e.machine != machines[arch].elf:
		return fmt.Errorf("a program for %v, want %v", e.machine, machines[arch].elf)
	case e.loader != "":
		return fmt.Errorf("dynamic: wants the loader %s (build with CGO_ENABLED=0)", e.loader)
	case len(e.libraries) > 0:
		return fmt.Errorf("dynamic: wants %s", strings.Join(e.libraries, " "))
	}
	return nil
}

// checkPrograms makes sure that every program and library of an image finds there what it needs, and
// that no link leads nowhere.
func (t tree) checkPrograms(arch string) error {
	for _, name := range slices.Sorted(maps.Keys(t)) {
		n := t[name]
		if n.kind == tar.TypeSymlink {
			if _, _, ok := t.resolve(name); !ok {
				return fmt.Errorf("%s: link to %s, which is not there", name, n.target)
			}
			continue
		}
		e, err := readELF(n.data)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if e == nil {
			continue
		}
		if e.machine != machines[arch].elf {
			return fmt.Errorf("%s: for %v, want %v", name, e.machine, machines[arch].elf)
		}
		needs := make([]string, 0, len(e.libraries)+1)
		if e.loader != "" {
			needs = append(needs, e.loader)
		}
		for _, lib := range e.libraries {
			needs = append(needs, "/usr/lib/"+triplets[arch]+"/"+lib)
		}
		for _, file := range needs {
			_, found, ok := t.resolve(file[1:])
			if !ok || found.kind != tar.TypeReg {
				return fmt.Errorf("%s: needs %s, which is not there", name, file)
			}
		}
	}
	return nil
}

// resolve follows the links in a path, as the kernel does.
func (t tree) resolve(name string) (string, node, bool) {
	at, rest := "", strings.Split(name, "/")
	for links := 0; len(rest) > 0; {
		next := path.Join(at, rest[0])
		rest = rest[1:]
		n, ok := t[next]
		if !ok {
			return "", node{}, false
		}
		if n.kind != tar.TypeSymlink {
			at = next
			continue
		}
		if links++; links > 40 {
			return "", node{}, false
		}
		rest = append(strings.Split(resolveLink(next, n.target), "/"), rest...)
		at = ""
	}
	return at, t[at], true
}
