// Command initramfs writes the root file system of a test VM: an uncompressed
// newc archive with a static program as /init, programs in /bin, files of this
// repository below /src, and kernel modules with all they depend on. Debian's packages
// hold no modules.dep (depmod makes it when they are installed), so dependencies are
// read from the modules themselves, and the libraries of programs from the programs.
package main

import (
	"bytes"
	"debug/elf"
	"flag"
	"fmt"
	"io/fs"
	"log"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

func main() {
	log.SetFlags(0)
	log.SetPrefix("initramfs: ")
	out := flag.String("o", "", "file to write")
	modules := flag.String("modules", "", "lib/modules/RELEASE of an unpacked kernel package")
	load := flag.String("load", "", "modules to load, by comma; those the kernel has built in are left out")
	suites := flag.String("suites", "", "file that becomes /suites")
	tools := flag.String("tools", "", "programs of this machine to put into /bin, by comma")
	source := flag.String("source", "", "files and directories to put below /src, by comma")
	flag.Parse()
	if *out == "" || *suites == "" || flag.NArg() == 0 {
		log.Fatal("usage: initramfs -o FILE -suites FILE [-modules DIR -load NAMES] [-tools NAMES] [-source PATHS] INIT [PROGRAM...]")
	}
	if err := write(*out, *suites, *modules, split(*load), split(*tools), split(*source), flag.Args()); err != nil {
		log.Fatal(err)
	}
}

// split cuts a list at its commas; nothing is an empty list.
func split(s string) []string {
	return strings.FieldsFunc(s, func(r rune) bool { return r == ',' })
}

func write(out, suites, modules string, load, tools, source, programs []string) error {
	a := &archive{made: make(map[string]bool)}
	for _, dir := range []string{"proc", "sys", "dev", "tmp", "run", "etc", "modules"} {
		a.dir(dir)
	}
	a.add("etc/passwd", 0o100644, []byte("root:x:0:0:root:/tmp:/bin/sh\n"))
	a.add("etc/hosts", 0o100644, []byte("127.0.0.1 localhost\n"))
	if err := a.copy("suites", suites); err != nil {
		return err
	}
	for i, p := range programs {
		name := "bin/" + filepath.Base(p)
		if i == 0 {
			name = "init"
		}
		if err := a.copy(name, p); err != nil {
			return err
		}
	}
	for _, name := range tools {
		if err := a.tool(name); err != nil {
			return err
		}
	}
	for _, p := range source {
		if err := a.tree(p); err != nil {
			return err
		}
	}
	order, err := findModules(modules, load)
	if err != nil {
		return err
	}
	var names []string
	for _, m := range order {
		names = append(names, m.name)
		a.add("modules/"+m.name, 0o100644, m.image)
	}
	a.add("modules.load", 0o100644, []byte(strings.Join(names, "\n")))
	a.add("TRAILER!!!", 0, nil)
	return os.WriteFile(out, a.Bytes(), 0o644)
}

// copy puts a file of this machine into the archive.
func (a *archive) copy(name, from string) error {
	data, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	a.add(name, 0o100755, data)
	return nil
}

// tree puts a file or directory of the repository below /src.
func (a *archive) tree(root string) error {
	return filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		return a.copy("src/"+p, p)
	})
}

// tool puts a program of this machine into /bin, with its libraries and the loader
// where they are here.
func (a *archive) tool(name string) error {
	p, err := exec.LookPath(name)
	if err != nil {
		return err
	}
	if err := a.copy("bin/"+name, p); err != nil {
		return err
	}
	return a.libraries(p)
}

var libraryDirs = []string{"/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib64", "/usr/lib64", "/usr/lib"}

func (a *archive) libraries(program string) error {
	f, err := elf.Open(program)
	if err != nil {
		return fmt.Errorf("%s: %w", program, err)
	}
	defer f.Close()
	need, err := f.ImportedLibraries()
	if err != nil {
		return fmt.Errorf("%s: %w", program, err)
	}
	if s := f.Section(".interp"); s != nil {
		data, err := s.Data()
		if err != nil {
			return err
		}
		need = append(need, string(bytes.TrimRight(data, "\x00")))
	}
	for _, name := range need {
		at := name
		if !filepath.IsAbs(name) {
			i := slices.IndexFunc(libraryDirs, func(dir string) bool {
				_, err := os.Stat(dir + "/" + name)
				return err == nil
			})
			if i < 0 {
				return fmt.Errorf("%s: no library %s", program, name)
			}
			at = libraryDirs[i] + "/" + name
		}
		if a.made[at[1:]] {
			continue
		}
		if err := a.copy(at[1:], at); err != nil {
			return err
		}
		if err := a.libraries(at); err != nil {
			return err
		}
	}
	return nil
}

// archive is a newc cpio archive: a header of 13 hexadecimal fields, the name and
// the data, each filled up to four bytes.
type archive struct {
	bytes.Buffer
	files int
	made  map[string]bool
}

// dir adds a directory and those above it.
func (a *archive) dir(name string) {
	if name == "." || a.made[name] {
		return
	}
	a.add(name, 0o040755, nil)
}

func (a *archive) add(name string, mode fs.FileMode, data []byte) {
	a.dir(path.Dir(name))
	a.made[name] = true
	a.files++
	fields := [13]uint32{0: uint32(a.files), 1: uint32(mode), 4: 1, 6: uint32(len(data)), 11: uint32(len(name) + 1)}
	a.WriteString("070701")
	for _, f := range fields {
		fmt.Fprintf(a, "%08x", f)
	}
	a.WriteString(name + "\x00")
	a.fill()
	a.Write(data)
	a.fill()
}

func (a *archive) fill() {
	for a.Len()%4 != 0 {
		a.WriteByte(0)
	}
}

type module struct {
	name  string
	image []byte
}

// findModules returns the modules that there are of those wanted, each behind
// those it depends on.
func findModules(dir string, want []string) ([]module, error) {
	paths := make(map[string]string)
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if name, _, found := strings.Cut(filepath.Base(path), ".ko"); found {
			paths[moduleName(name)] = path
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	var order []module
	var visit func(names []string) error
	visit = func(names []string) error {
		for _, name := range names {
			name = moduleName(name)
			path, found := paths[name]
			if !found {
				continue
			}
			delete(paths, name)
			image, err := readModule(path)
			if err != nil {
				return fmt.Errorf("%s: %w", path, err)
			}
			depends, err := dependencies(image)
			if err != nil {
				return fmt.Errorf("%s: %w", path, err)
			}
			if err := visit(depends); err != nil {
				return err
			}
			order = append(order, module{name, image})
		}
		return nil
	}
	return order, visit(want)
}

func moduleName(s string) string { return strings.ReplaceAll(s, "-", "_") }

func readModule(path string) ([]byte, error) {
	if strings.HasSuffix(path, ".xz") {
		return exec.Command("xz", "-dc", path).Output()
	}
	return os.ReadFile(path)
}

// dependencies reads "depends=a,b" of the section .modinfo.
func dependencies(image []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(image))
	if err != nil {
		return nil, err
	}
	section := f.Section(".modinfo")
	if section == nil {
		return nil, fmt.Errorf("no section .modinfo")
	}
	info, err := section.Data()
	if err != nil {
		return nil, err
	}
	for entry := range strings.SplitSeq(string(info), "\x00") {
		if list, found := strings.CutPrefix(entry, "depends="); found && list != "" {
			return strings.Split(list, ","), nil
		}
	}
	return nil, nil
}
