package main

import (
	"encoding/json"
	"os"
	"regexp"
	"strings"
	"testing"
)

// sampleSBOM is that of the test's own binary, with the packages of a real image.
func sampleSBOM(t *testing.T) *document {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	binary, err := os.ReadFile(self)
	if err != nil {
		t.Fatal(err)
	}
	mods, err := modules(t.Context(), "../..", binary)
	if err != nil {
		t.Fatal(err)
	}
	l, err := readLock(lockText)
	if err != nil {
		t.Fatal(err)
	}
	d := newDocument(source{version: "v1", commit: "c0ffee", date: someDate}, iptables, "arm64", binary)
	d.addModules(mods)
	d.addPackages(l.of("arm64"))
	return d
}

// What SPDX 2.3 asks of a document that is valid, as far as ours uses it.
func TestSBOMIsValid(t *testing.T) {
	d := sampleSBOM(t)
	again := sampleSBOM(t)
	a, err := json.Marshal(d)
	if err != nil {
		t.Fatal(err)
	}
	if b, err := json.Marshal(again); err != nil || string(a) != string(b) {
		t.Errorf("%v: another document of the same image", err)
	}
	if d.SPDXVersion != "SPDX-2.3" || d.DataLicense != "CC0-1.0" || !strings.HasPrefix(d.Namespace, "https://") || strings.Contains(d.Namespace, "#") {
		t.Errorf("%+v", d)
	}
	id := regexp.MustCompile(`^SPDXRef-[A-Za-z0-9.-]+$`)
	known := map[string]bool{d.SPDXID: true}
	ids := []string{idBinary}
	for _, p := range d.Packages {
		ids = append(ids, p.SPDXID)
		if p.Name == "" || p.Version == "" || p.Download == "" || p.LicenseDeclared == "" || p.LicenseConcluded == "" || p.Copyright == "" || p.FilesAnalyzed {
			t.Errorf("not complete: %+v", p)
		}
		for _, ref := range p.Refs {
			if !regexp.MustCompile(`^pkg:(golang|deb/debian)/[^@\s]+@[^@\s+]+$`).MatchString(ref.Locator) {
				t.Errorf("package URL %q", ref.Locator)
			}
		}
	}
	for _, i := range ids {
		if !id.MatchString(i) || known[i] {
			t.Errorf("identifier %q: not well-formed, or twice", i)
		}
		known[i] = true
	}
	related := map[string]bool{}
	for _, r := range d.Relationships {
		related[r.Related] = true
		if !known[r.Element] || !known[r.Related] {
			t.Errorf("%+v: of something unknown", r)
		}
	}
	for i := range known {
		if i != idDocument && !related[i] {
			t.Errorf("%s: related to nothing", i)
		}
	}
}

func TestSBOMNamesEverything(t *testing.T) {
	d := sampleSBOM(t)
	got := map[string]spdxPackage{}
	for _, p := range d.Packages {
		got[p.Name] = p
	}
	if p := got["stdlib"]; !strings.HasPrefix(p.Version, "1.") || p.LicenseDeclared != "BSD-3-Clause" {
		t.Errorf("the Go library: %+v", p)
	}
	for _, name := range []string{"libc6", "iptables", "libxtables12"} {
		p := got[name]
		if len(p.Checksums) != 1 || len(p.Checksums[0].Value) != 64 || p.LicenseDeclared == noAssertion || !strings.HasSuffix(p.Refs[0].Locator, "?arch=arm64&distro=trixie") {
			t.Errorf("%s: %+v", name, p)
		}
	}
}

func TestLicense(t *testing.T) {
	const bsd = "Redistribution and use in source and\nbinary forms, with or without"
	for want, texts := range map[string]map[string][]byte{
		"NOASSERTION":        {"LICENSE": []byte("You may look at it.")},
		"BSD-2-Clause":       {"LICENSE": []byte(bsd)},
		"BSD-3-Clause":       {"COPYING": []byte(bsd + " may be used to endorse or promote products")},
		"Apache-2.0 AND MIT": {"LICENSE": []byte("Apache License\n   Version 2.0, January 2004"), "LICENSE.x": []byte(`Permission is hereby granted, free of charge, to any person obtaining a copy ... THE SOFTWARE IS PROVIDED "AS IS"`)},
		"ISC":                {"LICENSE": []byte("Permission to use, copy, modify, and/or distribute this software for any purpose"), "NOTICE": []byte(bsd)},
	} {
		if got := (goModule{texts: texts}).license(); got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
}
