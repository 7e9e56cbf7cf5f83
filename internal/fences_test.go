// Package internal holds the tests of the repository's own rules; it has no code.
package internal

import (
	"bufio"
	"encoding/json"
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const module = "bauta.dev/bauta/"

// A fence says which packages may import what begins with prefix.
type fence struct {
	prefix  string
	allowed []string // below internal/; a package's subpackages are allowed too
	reason  string
}

var fences = []fence{
	{"k8s.io/", []string{"nodes"}, "one package talks to Kubernetes and carries client-go's weight"},
	{"k8s.io/api/", []string{"nodes/nodestest"}, "the types of the API would be half of the binary: nodes has its own"},
	{"github.com/cilium/ebpf", []string{"datapath"}, "every BPF object has one owner"},
	{"github.com/vishvananda/", []string{"datapath", "devices", "iptables", "conntrack", "lab"}, "the kernel's network state enters as values, read in one place"},
	{"os/exec", []string{"lab", "demo", "iptables", "test/kernels", "test/cluster", "packaging/image"}, "the agent runs in an image without tools; only iptables mode needs one"},
	{"github.com/prometheus/", []string{"metrics"}, "the agent gives readings; how Prometheus has them is nobody else's affair"},
	{"github.com/fsnotify/", []string{"filewatch"}, "how file changes are noticed is nobody else's affair"},
	{"github.com/spf13/", []string{"cli"}, "options come from config; flags are one of its sources"},
	{"testing", []string{"lab/labtest"}, "a test helper is a package of its own, so that the binary has none"},
}

// levels is the order of packages: each imports those of lower levels only.
var levels = map[string]int{
	"advice": 0, "policy": 0, "filewatch": 0, "lab": 0, "lab/packet": 0,
	"policy/policytest": 1, "config": 1, "conntrack": 1, "ipmasq": 1, "devices": 1, "datapath": 1, "iptables": 1, "lab/labtest": 1,
	"nodes": 1, "nodes/nodestest": 0,
	"metrics": 2, "demo": 2,
	"agent": 3,
	"cli":   4,
}

var vagueNames = []string{"util", "utils", "common", "types", "helper", "helpers", "client", "manager"}

// maxLines is where a file is split by what it is about.
const maxLines = 450

type goPackage struct {
	ImportPath, Dir, Name, Doc string
	GoFiles, Imports           []string
}

// short is the path below internal/, or the path in the module for others.
func (p goPackage) short() string {
	return strings.TrimPrefix(strings.TrimPrefix(p.ImportPath, module), "internal/")
}

// goPackages lists the packages of the module that have code besides tests.
func goPackages(t *testing.T) []goPackage {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", "list", "-e", "-json=ImportPath,Dir,Name,Doc,GoFiles,Imports", "./...")
	cmd.Dir = ".."
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var list []goPackage
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p goPackage
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return list
		} else if err != nil {
			t.Fatalf("go list: %v", err)
		}
		if len(p.GoFiles) > 0 {
			list = append(list, p)
		}
	}
}

func TestFences(t *testing.T) {
	for _, p := range goPackages(t) {
		for _, f := range fences {
			if slices.ContainsFunc(f.allowed, func(a string) bool { return p.short() == a || strings.HasPrefix(p.short(), a+"/") }) {
				continue
			}
			for _, imp := range p.Imports {
				if imp == f.prefix || strings.HasPrefix(imp, strings.TrimSuffix(f.prefix, "/")+"/") {
					t.Errorf("%s imports %s: %s", p.short(), imp, f.reason)
				}
			}
		}
		if p.short() == "policy" {
			for _, imp := range p.Imports {
				if first, _, _ := strings.Cut(imp, "/"); strings.Contains(first, ".") {
					t.Errorf("policy imports %s: the decision is a pure function of values, and needs the standard library only", imp)
				}
			}
		}
	}
}

func TestLevels(t *testing.T) {
	for _, p := range goPackages(t) {
		if !strings.HasPrefix(p.ImportPath, module+"internal/") {
			continue
		}
		level, ok := levels[p.short()]
		if !ok {
			t.Errorf("%s: give it a place in levels here and a row in docs/ARCHITECTURE.md", p.short())
			continue
		}
		for _, imp := range p.Imports {
			below, ok := strings.CutPrefix(imp, module+"internal/")
			if ok && levels[below] >= level {
				t.Errorf("%s imports %s, which is not below it: pass a value, or move the code to the package that owns it", p.short(), below)
			}
		}
	}
}

func TestPackagesAreInTheArchitecture(t *testing.T) {
	page, err := os.ReadFile("../docs/ARCHITECTURE.md")
	if err != nil {
		t.Fatal(err)
	}
	named := make(map[string]bool)
	quoted := regexp.MustCompile("`([^`]+)`")
	for line := range strings.Lines(string(page)) {
		if cells := strings.Split(line, "|"); len(cells) > 3 {
			for _, m := range quoted.FindAllStringSubmatch(cells[1], -1) {
				named[m[1]] = true
			}
		}
	}
	for _, p := range goPackages(t) {
		if strings.HasPrefix(p.ImportPath, module+"internal/") && !named[p.short()] {
			t.Errorf("%s: no row in the table of docs/ARCHITECTURE.md", p.short())
		}
	}
}

func TestPackageNamesAndDocs(t *testing.T) {
	for _, p := range goPackages(t) {
		if p.Doc == "" {
			t.Errorf("%s: no package comment: say in a sentence what it is for", p.short())
		}
		if slices.Contains(vagueNames, p.Name) || slices.Contains(vagueNames, path.Base(p.ImportPath)) {
			t.Errorf("%s: a package is named for what it knows", p.short())
		}
	}
}

// sources calls visit for every file of the repository with one of the extensions
// that a person wrote.
func sources(t *testing.T, visit func(name string, lines []string), extensions ...string) {
	t.Helper()
	err := filepath.WalkDir("..", func(name string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir():
			if base := d.Name(); name != ".." && strings.HasPrefix(base, ".") || base == "build" || base == "testdata" {
				return filepath.SkipDir
			}
			return nil
		case !slices.Contains(extensions, filepath.Ext(name)) || strings.HasSuffix(name, "_test.go"):
			return nil
		}
		file, err := os.Open(name)
		if errors.Is(err, fs.ErrNotExist) {
			return nil // an editor's temporary file
		} else if err != nil {
			return err
		}
		defer file.Close()
		var lines []string
		scan := bufio.NewScanner(file)
		scan.Buffer(nil, 1<<20)
		for scan.Scan() {
			if strings.HasPrefix(scan.Text(), "// Code generated ") {
				return nil
			}
			lines = append(lines, scan.Text())
		}
		visit(strings.TrimPrefix(filepath.ToSlash(name), "../"), lines)
		return scan.Err()
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestFileLengths(t *testing.T) {
	sources(t, func(name string, lines []string) {
		if len(lines) > maxLines {
			t.Errorf("%s: %d lines, the limit is %d: split it by what it is about", name, len(lines), maxLines)
		}
	}, ".go", ".c", ".h")
}

func TestErrorStyle(t *testing.T) {
	sources(t, func(name string, lines []string) {
		file, err := parser.ParseFile(token.NewFileSet(), name, strings.Join(lines, "\n"), parser.SkipObjectResolution)
		if err != nil {
			return // the compiler says it better
		}
		ast.Inspect(file, func(n ast.Node) bool {
			if s, ok := n.(*ast.BasicLit); ok && s.Kind == token.STRING && strings.Contains(strings.ToLower(s.Value), "failed to") {
				t.Errorf("%s: %s: name the object and the operation instead of \"failed to\"", name, s.Value)
			}
			return true
		})
	}, ".go")
}
