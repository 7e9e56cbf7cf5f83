package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"bauta.dev/bauta/internal/advice"
)

// source says what is built: everything in the image that is not a file of the tree comes from here.
type source struct {
	version string
	commit  string    // "" outside a repository; ends in "-dirty" with local changes
	date    time.Time // of every file and label
}

// readSource asks Git. SOURCE_DATE_EPOCH goes before the commit's date, and is needed without Git.
func readSource(ctx context.Context, root, version string) (source, error) {
	s := source{version: version}
	commit, noGit := git(ctx, root, "rev-parse", "HEAD")
	if noGit == nil {
		changes, err := git(ctx, root, "status", "--porcelain")
		if err != nil {
			return source{}, err
		}
		s.commit = commit
		if changes != "" {
			s.commit += "-dirty"
		}
		if s.version == "" {
			if s.version, err = git(ctx, root, "describe", "--tags", "--always", "--dirty"); err != nil {
				return source{}, err
			}
		}
	}
	if s.version == "" {
		return source{}, advice.New(fmt.Errorf("version: unknown outside a Git repository (%w)", noGit), "give -version")
	}
	epoch := os.Getenv("SOURCE_DATE_EPOCH")
	if epoch == "" && noGit == nil {
		var err error
		if epoch, err = git(ctx, root, "log", "-1", "--format=%ct"); err != nil {
			return source{}, err
		}
	}
	if epoch == "" {
		return source{}, advice.New(fmt.Errorf("date: unknown outside a Git repository (%w)", noGit),
			"set SOURCE_DATE_EPOCH to the seconds since 1970 that files shall have")
	}
	sec, err := strconv.ParseInt(epoch, 10, 64)
	if err != nil || sec < 0 {
		return source{}, fmt.Errorf("SOURCE_DATE_EPOCH %q: not a number of seconds", epoch)
	}
	s.date = time.Unix(sec, 0).UTC()
	return s, nil
}

func git(ctx context.Context, root string, args ...string) (string, error) {
	out, err := output(exec.CommandContext(ctx, "git", append([]string{"-C", root}, args...)...))
	return strings.TrimSpace(out), err
}

// output runs a command; its error is what the command said.
func output(cmd *exec.Cmd) (string, error) {
	out, err := cmd.Output()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok && len(exit.Stderr) > 0 {
		err = errors.New(strings.TrimSpace(string(exit.Stderr)))
	}
	if err != nil {
		return "", fmt.Errorf("%s %s: %w", cmd.Args[0], cmd.Args[1], err)
	}
	return string(out), nil
}
