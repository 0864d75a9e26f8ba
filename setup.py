"""Everything is read from settings.ini; edit there, not here."""
import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

parser = ConfigParser(delimiters=["="])
parser.read("settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]
package = settings["lib_path"]


def words(key: str) -> list[str]:
    "A whitespace-separated list of settings.ini."
    return shlex.split(settings.get(key, ""))


setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    keywords=settings["keywords"],
    author=settings["author"],
    license="Apache-2.0",
    classifiers=[
        "Development Status :: 3 - Alpha",
        f"Intended Audience :: {settings['audience']}",
        "Programming Language :: Python :: 3",
    ],
    python_requires=f">={settings['min_python']}",
    packages=find_packages(include=[package, f"{package}.*"]),
    package_data={package: ["py.typed", "weights/*"]},
    include_package_data=True,
    install_requires=words("requirements"),
    extras_require={"dev": words("dev_requirements")},
    entry_points={
        "console_scripts": words("console_scripts"),
        "nbdev": [f"{package}={package}._modidx:d"],
    },
    zip_safe=False,
)
