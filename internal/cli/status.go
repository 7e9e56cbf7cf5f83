package cli

import (
	"errors"
	"io/fs"
	"strings"

	"github.com/spf13/cobra"

	"bauta.dev/bauta/internal/advice"
	"bauta.dev/bauta/internal/agent"
)

func (a *app) newStatus() *cobra.Command {
	var f *format
	var brief bool
	c := &cobra.Command{
		Use:   "status",
		Short: "Show what is running",
		Long: `Show what is running: the masquerading in force, the agent, devices, source
ranges, files, flows, ports, drops and warnings.

With the agent down it reads what that left in the kernel. The exit status is 0 if
all is well, 3 if something is degraded, and 1 if there is neither an agent nor a
data plane.`,
		Example: `  bauta status
  bauta status --brief
  bauta status -o json | jq .flows`,
		Args: noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			st, err := agent.ReadStatus(a.bpfRoot, a.runDir)
			if err != nil {
				return a.noStatus(err)
			}
			return a.showStatus(st, *f, brief)
		},
	}
	c.Flags().BoolVar(&brief, "brief", false, "one line: OK, or what is degraded")
	f = outputFlag(c)
	return c
}

func (a *app) noStatus(err error) error {
	var what []string
	if !a.Root && !errors.Is(err, fs.ErrPermission) { // that says it already
		what = append(what, "only root can see an agent: try sudo bauta status")
	}
	if errors.Is(err, agent.ErrNothing) && len(hints(err)) == 0 {
		what = append(what, "bauta agent starts one",
			"if one runs with other directories, give them: --bpf-root DIR --run-dir DIR (now "+a.bpfRoot+" and "+a.runDir+")")
	}
	return advice.New(err, what...)
}

func (a *app) showStatus(st agent.Status, f format, brief bool) error {
	degraded := st.Degraded()
	text := func() string { return statusText(st) }
	if brief {
		text = func() string {
			if len(degraded) == 0 {
				return "OK\n"
			}
			return strings.Join(degraded, "; ") + "\n"
		}
	}
	if err := a.show(f, st, text); err != nil {
		return err
	}
	if len(degraded) > 0 {
		return errDegraded
	}
	return nil
}
