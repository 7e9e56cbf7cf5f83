package cli

import (
	"cmp"
	"runtime"
	"runtime/debug"
	"strings"

	"github.com/spf13/cobra"

	"bauta.dev/bauta/internal/datapath"
)

// version is set by release builds: -ldflags "-X bauta.dev/bauta/internal/cli.version=v1.2.3".
// commit is set by builds without Git's stamp (-buildvcs=false), which depends on the clone's tags;
// it ends in "-dirty" if there were local changes.
var version, commit string

// versionInfo is what this binary was made of.
type versionInfo struct {
	Version  string `json:"version"`
	Commit   string `json:"commit"`
	Modified bool   `json:"modified,omitempty"` // the commit, with local changes
	Go       string `json:"go"`
	Platform string `json:"platform"`
	Object   string `json:"object"` // tag of the embedded BPF object
}

func (a *app) version() versionInfo {
	v := versionInfo{Version: a.Version, Commit: "unknown", Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH, Object: datapath.ObjectTag()}
	if info, ok := debug.ReadBuildInfo(); ok {
		v.Version = cmp.Or(v.Version, strings.Trim(info.Main.Version, "()")) // "(devel)" in tests and plain builds
		for _, s := range info.Settings {
			switch s.Key {
			case "vcs.revision":
				v.Commit = s.Value
			case "vcs.modified":
				v.Modified = s.Value == "true"
			}
		}
	}
	if commit != "" {
		v.Commit, v.Modified = strings.CutSuffix(commit, "-dirty")
	}
	v.Version = cmp.Or(v.Version, "devel")
	return v
}

func (a *app) newVersion() *cobra.Command {
	var f *format
	c := &cobra.Command{
		Use:   "version",
		Short: "Show the version",
		Long:  "Show the version of this binary, and of the BPF object in it.",
		Example: `  bauta version
  bauta version -o json`,
		Args: noArgs,
		RunE: func(*cobra.Command, []string) error {
			v := a.version()
			return a.show(*f, v, v.text)
		},
	}
	f = outputFlag(c)
	return c
}

func (v versionInfo) text() string {
	commit := v.Commit
	if v.Modified {
		commit += " (modified)"
	}
	return table(
		[]string{"bauta", v.Version},
		[]string{"commit", commit},
		[]string{"go", v.Go + " " + v.Platform},
		[]string{"object", v.Object})
}
