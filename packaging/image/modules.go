package main

import (
	"bytes"
	"context"
	"debug/buildinfo"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
)

// goModule is one whose code is in the binary.
type goModule struct {
	path, version, sum string
	texts              map[string][]byte // license files: most licenses ask for them to go along
}

var licenseFile = regexp.MustCompile(`(?i)^(licen[cs]e|copying|notice|patents)([._-][a-z0-9._-]+)?$`)

// modules reads from the binary itself what it was linked from; Go's own library comes first.
func modules(ctx context.Context, root string, binary []byte) ([]goModule, error) {
	info, err := buildinfo.Read(bytes.NewReader(binary))
	if err != nil {
		return nil, fmt.Errorf("binary: %w", err)
	}
	goroot, err := goTool(ctx, root, "env", "GOROOT")
	if err != nil {
		return nil, err
	}
	dirs, err := moduleDirs(ctx, root)
	if err != nil {
		return nil, err
	}
	list := []goModule{{path: "stdlib", version: strings.TrimPrefix(info.GoVersion, "go")}}
	dirs["stdlib"] = strings.TrimSpace(goroot)
	for _, dep := range info.Deps {
		if dep.Replace != nil {
			dep = dep.Replace
		}
		list = append(list, goModule{path: dep.Path, version: dep.Version, sum: dep.Sum})
	}
	for i := range list {
		if list[i].texts, err = licenseTexts(dirs[list[i].path]); err != nil {
			return nil, fmt.Errorf("license of %s: %w", list[i].path, err)
		}
	}
	return list, nil
}

func goTool(ctx context.Context, root string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOFLAGS=-mod=readonly", "GOWORK=off")
	return output(cmd)
}

// moduleDirs says where the modules of the build are unpacked. Others of the graph need not be there.
func moduleDirs(ctx context.Context, root string) (map[string]string, error) {
	out, err := goTool(ctx, root, "list", "-deps", "-json=Module", "./cmd/bauta")
	if err != nil {
		return nil, err
	}
	dirs := make(map[string]string)
	for dec := json.NewDecoder(strings.NewReader(out)); ; {
		var p struct {
			Module *struct {
				Path, Dir string
				Replace   *struct{ Path string }
			}
		}
		switch err := dec.Decode(&p); {
		case errors.Is(err, io.EOF):
			return dirs, nil
		case err != nil:
			return nil, fmt.Errorf("go list: %w", err)
		case p.Module == nil: // of the Go library
		case p.Module.Replace != nil:
			dirs[p.Module.Replace.Path] = p.Module.Dir
		default:
			dirs[p.Module.Path] = p.Module.Dir
		}
	}
}

func licenseTexts(dir string) (map[string][]byte, error) {
	if dir == "" {
		return nil, errors.New("the module is not unpacked (go mod download)")
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	texts := make(map[string][]byte)
	for _, e := range entries {
		if !e.Type().IsRegular() || !licenseFile.MatchString(e.Name()) {
			continue
		}
		if texts[e.Name()], err = os.ReadFile(filepath.Join(dir, e.Name())); err != nil {
			return nil, err
		}
	}
	if len(texts) == 0 {
		return nil, fmt.Errorf("no license file in %s", dir)
	}
	return texts, nil
}

// licensePhrases are what only the text of that license has.
var licensePhrases = []struct {
	id   string
	has  []string
	hasn []string
}{
	{"Apache-2.0", []string{"apache license version 2.0, january 2004"}, nil},
	{"MIT", []string{"permission is hereby granted, free of charge, to any person obtaining a copy", `the software is provided "as is"`}, nil},
	{"BSD-3-Clause", []string{"redistribution and use in source and binary forms", "may be used to endorse or promote products"}, nil},
	{"BSD-2-Clause", []string{"redistribution and use in source and binary forms"}, []string{"may be used to endorse or promote products"}},
	{"ISC", []string{"permission to use, copy, modify, and/or distribute this software for any purpose"}, nil},
	{"MPL-2.0", []string{"mozilla public license version 2.0"}, nil},
}

// license is the SPDX expression for the license files, as far as their texts are known ones.
func (m goModule) license() string {
	found := make(map[string]bool)
	for name, text := range m.texts {
		if up := strings.ToUpper(name); strings.HasPrefix(up, "NOTICE") || strings.HasPrefix(up, "PATENTS") {
			continue
		}
		flat := strings.Join(strings.Fields(strings.ToLower(string(text))), " ")
		for _, l := range licensePhrases {
			if containsAll(flat, l.has) && !containsAny(flat, l.hasn) {
				found[l.id] = true
			}
		}
	}
	var ids []string
	for _, l := range licensePhrases {
		if found[l.id] {
			ids = append(ids, l.id)
		}
	}
	if len(ids) == 0 {
		return "NOASSERTION"
	}
	return strings.Join(ids, " AND ")
}

func containsAll(s string, phrases []string) bool {
	for _, p := range phrases {
		if !strings.Contains(s, p) {
			return false
		}
	}
	return true
}

func containsAny(s string, phrases []string) bool {
	for _, p := range phrases {
		if strings.Contains(s, p) {
			return true
		}
	}
	return false
}
