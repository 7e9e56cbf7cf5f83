// Command initramfs writes the root file system of a test VM: an uncompressed
// newc archive with a static program as /init, other files, and kernel modules
// with all they depend on. Debian's packages hold no modules.dep (depmod makes it
// when they are installed), so dependencies are read from the modules themselves.
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
	"path/filepath"
	"strings"
)

func main() {
	log.SetFlags(0)
	log.SetPrefix("initramfs: ")
	out := flag.String("o", "", "file to write")
	modules := flag.String("modules", "", "lib/modules/RELEASE of an unpacked kernel package")
	load := flag.String("load", "", "modules to load, by comma; those the kernel has built in are left out")
	args := flag.String("args", "", "arguments of /test, by space")
	flag.Parse()
	if flag.NArg() == 0 {
		log.Fatal("usage: initramfs -o FILE [-modules DIR -load NAMES] [-args ARGS] INIT [OTHER...]")
	}
	a := &archive{}
	for _, dir := range []string{"proc", "sys", "dev", "tmp", "modules"} {
		a.add(dir, fs.FileMode(0o040755), nil)
	}
	for i, path := range flag.Args() {
		name := filepath.Base(path)
		if i == 0 {
			name = "init"
		}
		data, err := os.ReadFile(path)
		if err != nil {
			log.Fatal(err)
		}
		a.add(name, 0o100755, data)
	}
	order, err := findModules(*modules, strings.Split(*load, ","))
	if err != nil {
		log.Fatal(err)
	}
	var names []string
	for _, m := range order {
		names = append(names, m.name)
		a.add("modules/"+m.name, 0o100644, m.image)
	}
	a.add("modules.load", 0o100644, []byte(strings.Join(names, "\n")))
	a.add("args", 0o100644, []byte(*args))
	a.add("TRAILER!!!", 0, nil)
	if err := os.WriteFile(*out, a.Bytes(), 0o644); err != nil {
		log.Fatal(err)
	}
}

// archive is a newc cpio archive: a header of 13 hexadecimal fields, the name and
// the data, each filled up to four bytes.
type archive struct {
	bytes.Buffer
	files int
}

func (a *archive) add(name string, mode fs.FileMode, data []byte) {
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
