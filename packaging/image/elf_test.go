package main

import (
	"debug/elf"
	"strings"
	"testing"
)

func TestCheckStatic(t *testing.T) {
	for _, c := range []struct {
		what, arch string
		binary     []byte
		want       string // in the error; empty: none
	}{
		{"static", "amd64", program(t, elf.EM_X86_64, ""), ""},
		{"static", "arm64", program(t, elf.EM_AARCH64, ""), ""},
		{"dynamic", "amd64", program(t, elf.EM_X86_64, "/lib64/ld-linux-x86-64.so.2"), "wants the loader /lib64/ld-linux-x86-64.so.2"},
		{"of another machine", "amd64", program(t, elf.EM_AARCH64, ""), "EM_AARCH64"},
		{"of another machine", "arm64", program(t, elf.EM_X86_64, ""), "EM_X86_64"},
		{"a script", "amd64", []byte("#!/bin/sh\n"), "not an ELF program"},
		{"cut", "amd64", program(t, elf.EM_X86_64, "")[:40], "EOF"},
	} {
		err := checkStatic(c.binary, c.arch)
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s, %s: %v, want %q", c.what, c.arch, err, c.want)
		}
	}
}

func TestCheckPrograms(t *testing.T) {
	const loader = "/lib64/ld.so"
	sound := func() tree {
		files := tree{}
		files.program("usr/sbin/tool", program(t, elf.EM_X86_64, loader))
		files.program("usr/lib/x86_64-linux-gnu/ld.so", program(t, elf.EM_X86_64, ""))
		files.link("usr/lib64/ld.so", "../lib/x86_64-linux-gnu/ld.so")
		files.link("lib64", "usr/lib64")
		return files
	}
	if err := sound().checkPrograms("amd64"); err != nil {
		t.Fatal(err)
	}
	for what, change := range map[string]func(tree){
		"no loader":          func(f tree) { delete(f, "usr/lib/x86_64-linux-gnu/ld.so") },
		"no link to it":      func(f tree) { delete(f, "lib64") },
		"links in a circle":  func(f tree) { f.link("lib64", "lib64") },
		"a dead link":        func(f tree) { f.link("usr/sbin/dead", "nothing") },
		"a folder as loader": func(f tree) { delete(f, "usr/lib/x86_64-linux-gnu/ld.so"); f.dir("usr/lib/x86_64-linux-gnu/ld.so") },
		"another machine":    func(f tree) { f.program("usr/sbin/other", program(t, elf.EM_AARCH64, "")) },
	} {
		files := sound()
		change(files)
		if err := files.checkPrograms("amd64"); err == nil {
			t.Errorf("%s: taken", what)
		}
	}
}
