package cli

import (
	"fmt"
	"io/fs"
	"slices"
	"testing"

	"bauta.dev/bauta/internal/advice"
	"bauta.dev/bauta/internal/agent"
)

// Who is refused is told once to be root.
func TestNoStatus(t *testing.T) {
	var a app
	refused := advice.New(fmt.Errorf("ask the agent: %w", fs.ErrPermission), "run it as root")
	if got := advice.Of(a.noStatus(refused)); !slices.Equal(got, []string{"run it as root"}) {
		t.Errorf("refused: %q", got)
	}
	if got := advice.Of(a.noStatus(agent.ErrNothing)); len(got) != 3 || got[0] != "only root can see an agent: try sudo bauta status" {
		t.Errorf("nothing there: %q", got)
	}
}
